"""``maskedlinear inspect``, ``convert`` and ``diff``: what they find in files, write and print.

Nothing is imported here: each of them imports what it needs, and of our own files that is NumPy alone.
"""
