"""``python -m maskedlinear_conformance.golden FILE``: make the golden vectors anew, to compare them."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

from maskedlinear_conformance.golden import SHA256, make


def main(argv: list[str]) -> int:
    """Write the vectors to the file named; return 0 if they are the published ones, 1 if not, 2 if no file is named."""
    if len(argv) != 1:
        print("name the file to write: python -m maskedlinear_conformance.golden FILE", file=sys.stderr)
        return 2
    content = make()
    Path(argv[0]).write_bytes(content)
    same = sha256(content).hexdigest() == SHA256
    print(f"{argv[0]}: {len(content)} bytes, {'the published ones' if same else 'NOT the published ones'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
