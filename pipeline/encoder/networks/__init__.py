"""Networks without their heads, wherever they come from, and their weights."""
