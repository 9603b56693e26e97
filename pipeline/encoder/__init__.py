"""The frozen backbone: its weights, and how it runs fast and reproducibly."""
