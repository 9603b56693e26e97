"""Drives that do not answer, that are gone, or that fail, and other shortages of the machine."""
