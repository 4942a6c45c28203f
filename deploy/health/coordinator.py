"""Whether the coordinator in this container works: exit status 0 where its loop turns, else 1 and a line that says why not.

It asks /healthz at the address that the coordinator left in its state directory, so it holds for every `http_port`.
A broker that is away makes no coordinator unhealthy: /readyz tells that.
"""  # noqa: INP001  copied into the image, never imported

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path


def main() -> int:
    """The exit status."""
    file = Path(os.environ.get("MIDGE_STATE_DIR", "midge-state")) / "service.json"
    try:
        url = json.loads(file.read_text(encoding="utf-8"))["url"]
        urllib.request.urlopen(f"{url}/healthz", timeout=4.0).close()  # noqa: S310  our own address
    except (OSError, ValueError, KeyError) as error:
        sys.stdout.write(f"{file}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
