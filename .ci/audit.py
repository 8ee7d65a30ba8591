"""
Are any of the pinned dependencies known to be vulnerable? One question to osv.dev, the database of PyPI's advisories.

    python .ci/audit.py              # report; nothing but a line without a network
    python .ci/audit.py --strict     # exit code 1 when there is one, or no answer

`make quality` reports, so that an advisory published tomorrow does not break today's commit; `make audit` is strict.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

OSV = "https://api.osv.dev/v1/querybatch"
TIMEOUT_SECONDS = 5
PINS = Path(__file__).parents[1] / "constraints.txt"


def read_pins(path: Path) -> list[tuple[str, str]]:
    """`name==version` lines as (name, version)."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [(name, version) for name, separator, version in (line.partition("==") for line in lines) if separator]


def known_vulnerabilities(pins: list[tuple[str, str]], url: str = OSV) -> dict[str, list[str]]:
    """`name version` -> ids of its advisories, for those that have any.

    Raises:
        OSError: there is no network, or the database does not answer.
    """
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in pins]
    body = json.dumps({"queries": queries}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            answers = json.load(response)["results"]
    except (ValueError, KeyError) as error:
        raise OSError(f"the answer of {url} is no list of results: {error}") from None
    found = ([entry["id"] for entry in answer.get("vulns", [])] for answer in answers)
    return {f"{name} {version}": ids for (name, version), ids in zip(pins, found, strict=True) if ids}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="exit code 1 on a finding or without an answer")
    parser.add_argument("--url", default=OSV, help="of the database")
    args = parser.parse_args()
    pins = read_pins(PINS)
    try:
        found = known_vulnerabilities(pins, args.url)
    except OSError as error:
        print(f"dependency audit: skipped, no answer from {args.url.split('/')[2]} ({error})")
        return int(args.strict)
    for package, ids in found.items():
        print(f"dependency audit: {package}: {', '.join(ids)}")
    print(f"dependency audit: {len(found)} of {len(pins)} pinned packages have known vulnerabilities")
    return int(args.strict and bool(found))


if __name__ == "__main__":
    sys.exit(main())
