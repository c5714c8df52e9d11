"""Steering vectors and their files."""
