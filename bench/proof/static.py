"""peftops bench static: what compilers make of GPU kernels, and whether they keep their limits.

It compiles for every kind of GPU, needs none, and proves nothing about time.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from peftops.cli import BadInput, Parser, need, positive
from peftops.cli.doctor import installed

from ..progress import Progress
from . import sass, static_cuda

COLUMNS = {  # of the table: a number, and what it is called
    "registers": "registers",
    "shared": "shared",
    "spilled": "spilled",
    "mma": "tensor core",
    "ldsm": "ldmatrix",
    "async": "async copies",
    "wide": "16-byte loads",
    "fma": "fma",
    "loop": "loop",
}


def options(argv):
    parser = Parser("peftops bench static", description=__doc__)
    parser.add_argument(
        "--all",
        action="store_true",
        help="every variant, instead of few that meet every flag and tile",
    )
    parser.add_argument(
        "--triton",
        action="append",
        default=[],
        metavar="VERSION",
        help="another triton, fetched by pip",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=os.cpu_count(),
        help="processes at once",
    )
    parser.add_argument(
        "--rows",
        action="store_true",
        help="a line for each variant, instead of their ranges",
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    need("torch", "triton")
    kept = None  # the folder of what was compiled before
    if (static_cuda.ROOT / "setup.py").exists():
        kept = static_cuda.ROOT / "build" / "static"
        kept.mkdir(parents=True, exist_ok=True)
    versions = [
        (installed("triton"), None),
        *((version, fetch(version)) for version in o.triton),
    ]
    rows = []
    with ThreadPoolExecutor(o.jobs) as pool, Progress() as progress:
        tasks = []
        for version, folder in versions:
            tasks += [
                pool.submit(triton_rows, version, folder, o.all, i, o.jobs, kept)
                for i in range(o.jobs)
            ]
        tasks += [pool.submit(cuda_rows, *task, kept) for task in cuda_tasks()]
        for done in progress.track(as_completed(tasks), len(tasks), "compiling"):
            rows += done.result()
    rows.sort(
        key=lambda row: (row["compiler"], row["kernel"], row["target"], row["case"])
    )
    print("\n".join(table(rows if o.rows else ranges(rows), o.rows)))
    failed = [row for row in rows if row["faults"]]
    for row in failed:
        where = ", ".join(
            filter(
                None,
                (
                    row["kernel"],
                    row["target"],
                    row["case"],
                    row["tile"],
                    row["compiler"],
                ),
            )
        )
        print(f"{where}: {'; '.join(row['faults'])}")
    absent = (
        ""
        if cuda_tasks()
        else "; CUDA C++ was not compiled, since there is no nvcc or no csrc here"
    )
    print(f"{len(rows)} kernels, {len(failed)} beyond their limits{absent}")
    return int(bool(failed))


def fetch(version):
    """A folder with this triton alone, which workers find before the one that is installed."""
    folder = static_cuda.ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                f"{beside}/triton",
            ]
            done = subprocess.run(
                [*pip, f"triton=={version}"], capture_output=True, text=True
            )
            if done.returncode:
                raise BadInput(
                    f"pip cannot fetch triton {version}: {done.stderr.strip().splitlines()[-1]}"
                )
            os.replace(f"{beside}/triton", folder)
    return str(folder)


def triton_rows(version, folder, everything, share, shares, kept):
    """Rows of a share of all launches, by the triton in the folder, or by the installed one."""
    preferred = f"sys.path.insert(0, {folder!r}); " if folder else ""
    call = f"worker({everything}, {share}, {shares}, {kept and str(kept)!r})"
    code = f"import sys; {preferred}from peftops.bench.proof.static_triton import worker; {call}"
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(
            f"compiling with triton {version} failed: {done.stderr.strip().splitlines()[-1]}"
        )
    return [
        json.loads(line) | {"compiler": f"triton {version}"}
        for line in done.stdout.splitlines()
    ]


def cuda_tasks():
    """(source, architecture) of all CUDA C++ that can be compiled here."""
    known = static_cuda.sources() if shutil.which("nvcc") else []
    return [(source, arch) for source in known for arch in static_cuda.architectures()]


def cuda_rows(source, arch, kept):
    """Rows of one source on one architecture, read from `kept` where nothing has changed."""
    compiled_by = [static_cuda.version(), arch, *static_cuda.FLAGS]
    compiled_by += [Path(module.__file__).read_text() for module in (static_cuda, sass)]
    text = [file.read_text() for file in (source, *sorted(source.parent.glob("*.*h")))]
    digest = hashlib.sha256(json.dumps([compiled_by, text]).encode()).hexdigest()[:24]
    file = kept / f"{source.stem}-{digest}.json" if kept else None
    if file and file.exists():
        return json.loads(file.read_text())
    rows = [
        row | {"compiler": f"nvcc {static_cuda.version()}"}
        for row in static_cuda.rows(source, arch)
    ]
    if file:
        file.write_text(json.dumps(rows))
    return rows


def ranges(rows):
    """A row for each compiler, kernel and target: the least and the most of each number."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["compiler"], row["kernel"], row["target"]].append(row)
    for (compiler, kernel, target), mine in groups.items():
        ends = {
            name: (min(row[name] for row in mine), max(row[name] for row in mine))
            for name in COLUMNS
        }
        numbers = {
            name: f"{a}" if a == b else f"{a}–{b}" for name, (a, b) in ends.items()
        }
        yield {
            "compiler": compiler,
            "kernel": kernel,
            "target": target,
            "variants": len(mine),
        } | numbers


def table(rows, single):
    names = [
        "compiler",
        "kernel",
        "target",
        *(["case", "tile"] if single else ["variants"]),
        *COLUMNS,
    ]
    lines = [
        [COLUMNS.get(name, name) for name in names],
        *([str(row[name]) for name in names] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return (
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
