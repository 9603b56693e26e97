"""The frozen backbone: its weights, its precision, and how it runs fast and reproducibly."""
