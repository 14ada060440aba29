"""Sizes as people write them."""

import argparse
import re

BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def byte_size(argument: str) -> int:
    """Bytes, as 8GiB, 512M or 1000000; K, M, G and T are powers of 1024. Errors are for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", argument.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size as 8GiB, not '{argument}'")
    return int(float(match[1]) * BYTES[match[2].upper()])
