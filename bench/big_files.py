"""Files larger than anyone wants in memory: a ShareGPT JSON cut off in the middle, and 2 GB of JSON and JSON Lines.

    python bench/big_files.py            # 125 MB cut off, 2 GB whole; 2 GB of disk for some minutes
    python bench/big_files.py --quick    # a tenth of it

Each file is read to its end by the loader's own reader and converter, in a process of its own whose peak memory is
reported. Asserted: the error for the cut file names it and the byte, and `skip` keeps every whole record.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import ROOT, write_results

READER = """
import json, logging, sys, time
from pathlib import Path
from adamba.data.cards import load_card
from adamba.data.files import read_records
from adamba.data.sources import Conversion
from adamba.errors import UserError
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
def peak_mib():  # not getrusage: its maximum is inherited from the process that started this one
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024
imports_mib = peak_mib()
conversion, kept, started, error = Conversion(load_card("sharegpt", "data_cards")), 0, time.perf_counter(), None
try:
    for record in read_records(Path(sys.argv[1]), sys.argv[2]):
        kept += conversion.convert(record) is not None
except UserError as problem:
    error = str(problem)
print(json.dumps({
    "records": conversion.seen, "rows": kept, "error": error,
    "seconds": time.perf_counter() - started,
    "peak_mib": peak_mib(), "imports_mib": imports_mib,
}))
"""
WORDS = "the model reads a long answer and the user asks again about tools games widths depth or cost".split()


def write_sharegpt(path: Path, num_bytes: int, lines: bool) -> int:
    """Conversations of ShareGPT's schema until the file has `num_bytes`; returns their number."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 400))) for _ in range(500)]
    opening, between, closing = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    count = 0
    with path.open("w", encoding="utf-8") as file:
        size = file.write(opening)
        while size < num_bytes:
            turns = [
                {"from": "human" if turn % 2 == 0 else "gpt", "value": rng.choice(texts)}
                for turn in range(2 * rng.randint(1, 6))
            ]
            record = json.dumps({"id": f"row{count}", "conversations": turns})
            size += file.write((between if count else "") + record)
            count += 1
        file.write(closing)
    return count


def read(path: Path, on_bad_file: str = "stop") -> dict:
    """What a fresh process found in the file, and its peak memory."""
    command = [sys.executable, "-c", READER, str(path), on_bad_file]
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr.strip().splitlines()[-1:]}


def cut_file(folder: Path, num_bytes: int) -> list[dict]:
    """The row of a file cut off in the middle of a record, for `stop` and for `skip`."""
    path = folder / "sharegpt_cut.json"
    write_sharegpt(path, num_bytes, lines=False)
    with path.open("r+b") as file:
        file.truncate(num_bytes // 2)
    text = path.read_text(encoding="utf-8")
    starts_at = text.rindex('{"id"')
    whole = text.count('{"id"') - 1
    stopped, skipped = read(path), read(path, "skip")
    assert stopped["error"] and str(path) in stopped["error"] and f"byte {starts_at}" in stopped["error"], stopped
    assert skipped["records"] == whole and skipped["error"] is None, (skipped, whole)
    error = stopped["error"].replace(str(folder), "…")
    return [
        {"file": "ShareGPT JSON, cut", "megabytes": num_bytes / 2e6, "on_bad_file": "stop", "error": error},
        {"file": "ShareGPT JSON, cut", "megabytes": num_bytes / 2e6, "on_bad_file": "skip", "whole_records": whole}
        | {"records_kept": skipped["records"], "seconds": skipped["seconds"], "peak_mib": skipped["peak_mib"]},
    ]


def whole_file(folder: Path, num_bytes: int, name: str) -> dict:
    """The row of a large whole file."""
    path = folder / name
    records = write_sharegpt(path, num_bytes, lines=name.endswith("jsonl"))
    found = read(path)
    megabytes = path.stat().st_size / 1e6
    path.unlink()
    assert found["records"] == records and found["error"] is None, found
    return {
        "file": f"ShareGPT {name.rpartition('.')[2].upper()}",
        "megabytes": megabytes,
        "records_kept": records,
        "seconds": found["seconds"],
        "peak_mib": found["peak_mib"],
        "imports_mib": found["imports_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    scale = 0.1 if quick else 1.0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = cut_file(folder, int(scale * 250e6))
        rows += [whole_file(folder, int(scale * 2e9), file) for file in ("large.json", "large.jsonl")]
    write_results("big_files", rows, started, quick=quick)


if __name__ == "__main__":
    main()
