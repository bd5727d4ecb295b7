"""The embedded corpus: the running interpreter's own standard-library source.

Every machine that can run evoprune has it, so nothing is downloaded. Each module belongs to one of four
disjoint sides, chosen by a hash of its path, so it stays on that side in every Python version:

- ``train``: what the reference model learned from;
- ``A``: calibration statistics;
- ``B``: search fitness;
- ``C``: held-out report.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SIDES = ("train", "A", "B", "C")

# Top-level modules and packages of every CPython 3.10 to 3.13, without test suites, number tables, generated text
# and the parts that distributions ship apart (tkinter, idlelib, ensurepip, lib2to3).
MODULES = tuple(
    """
    __future__ _collections_abc _compat_pickle _compression _markupbase _py_abc _pydecimal _pyio _sitebuiltins
    _strptime _threading_local _weakrefset abc argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd code
    codecs codeop collections colorsys compileall concurrent configparser contextlib contextvars copy copyreg csv
    ctypes curses dataclasses datetime dbm decimal difflib dis doctest email enum filecmp fileinput fnmatch fractions
    ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http imaplib
    importlib inspect io ipaddress json keyword linecache locale logging lzma mailbox mimetypes modulefinder
    multiprocessing netrc ntpath nturl2path numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil
    platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re
    reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver
    sqlite3 ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny tarfile tempfile
    textwrap threading timeit token tokenize trace traceback tracemalloc tty turtle types typing unittest urllib uuid
    venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
    """.split()
)


def side_of(module_path: str) -> str:
    """The side of a module, from its path relative to the library folder, with forward slashes."""
    # The prefix is chosen so that the sides come out near 77, 7, 8 and 8 % of the text.
    draw = int.from_bytes(hashlib.sha256(f"evoprune-corpus-153{module_path}".encode()).digest()[:8], "big") % 100
    if draw < 76:
        return "train"
    if draw < 83:
        return "A"
    return "B" if draw < 92 else "C"


def library_files(library: Path) -> Iterator[str]:
    """Paths of the listed modules below `library`, sorted, relative, with forward slashes."""
    for name in sorted(MODULES):
        if (library / f"{name}.py").is_file():
            yield f"{name}.py"
        elif (library / name).is_dir():
            for folder, subfolders, files in os.walk(library / name):
                subfolders[:] = sorted(set(subfolders) - {"test", "tests", "__pycache__"})
                for file in sorted(files):
                    if file.endswith(".py"):
                        yield (Path(folder) / file).relative_to(library).as_posix()


@cache
def read_side(side: str, library: Path | None = None) -> tuple[str, ...]:
    """The documents of one side, one string a module, in path order.

    Args:
        side: one of `SIDES`.
        library: the folder of the standard library; the running interpreter's by default.

    Raises:
        ValueError: `side` is not one of `SIDES`.
    """
    if side not in SIDES:
        raise ValueError(f"no corpus side {side!r}; the sides are {', '.join(SIDES)}")
    root = library or Path(sysconfig.get_paths()["stdlib"])
    return tuple(
        (root / path).read_text(encoding="utf-8", errors="replace").strip() + "\n"
        for path in library_files(root)
        if side_of(path) == side and (root / path).stat().st_size > 0
    )


def side_hash(side: str) -> str:
    """sha256 over the documents of one side: part of a run's identity."""
    digest = hashlib.sha256()
    for document in read_side(side):
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()
