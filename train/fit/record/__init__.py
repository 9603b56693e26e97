"""What a run leaves behind: its folder, its log, its curves; and runs side by side."""
