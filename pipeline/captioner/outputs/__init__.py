"""Files that captions go to: tables, JSON lines, COCO's results, and files beside photos."""
