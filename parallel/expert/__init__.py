"""Experts over ranks: token groups whose exchanges overlap their products. Start with ``schedule.py``."""
