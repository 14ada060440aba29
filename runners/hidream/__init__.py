"""Editing pictures with HiDream-E1."""
