"""Graphs of a module's forward: when one is made, what it depends on, where it is kept, and when it is dropped."""
