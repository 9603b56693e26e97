"""Sheets: photos with their captions set below them, in one PNG or a few."""
