"""Refresh the patch series against another upstream release.

    python patches/refresh.py 0.3.37                    # the release from the package index
    python patches/refresh.py path/to/archive.tar.gz    # a local source distribution
    python patches/refresh.py path/to/folder            # an unpacked one: patches and hashes only, the pin stays

Each patch is applied with git, which finds hunks that moved, and again with less context where that fails. If all fit,
the patches are written anew (headers kept), and so are pin.json and upstream.sha256. If one does not, nothing is
written: the report names patch and hunks, and the half-patched tree stays for a look.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "backend"))  # a script next to the backend, not an installed one

from llama_patches.errors import BuildError  # noqa: E402
from llama_patches.pin import Pin, file_sha256  # noqa: E402
from llama_patches.series import Patch, read_series  # noqa: E402

LESS_CONTEXT = ((), ("-C2",), ("-C1",))
REJECTED = re.compile(r"^Applying patch (\S+) with |^Rejected hunk #(\d+)|^error: (\S+: (?:No such|does not).*)$", re.M)


@dataclass
class Report:
    """What became of the patches: names of those written as they were, moved, and, with reasons, those that failed."""

    same: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)


def wanted_files(tree: Path, patterns: Path) -> list[Path]:
    """The files of `tree` that the build needs, sorted.

    Raises:
        BuildError: a pattern of the list matches nothing, so upstream moved something.
    """
    found: set[Path] = set()
    for line in patterns.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        paths = (tree / line[:-3]).rglob("*") if line.endswith("/**") else tree.glob(line)
        files = {p for p in paths if p.is_file() and "/." not in f"/{p.relative_to(tree).as_posix()}"}
        if not files:
            raise BuildError(f"{patterns.name}: {line} matches nothing in {tree}")
        found |= files
    return sorted(found, key=lambda path: path.relative_to(tree).as_posix())


def refresh_patch(patch: Patch, tree: Path, today: str) -> str | list[str]:
    """Apply one patch to the committed tree and commit it.

    Returns:
        The new text of the patch, or the reasons why it does not apply.
    """
    body = patch.text[len(patch.header) :]
    for options in LESS_CONTEXT:
        if git(tree, "apply", "--index", *options, "-", text=body, check=False).returncode == 0:
            break
    else:
        refused = git(tree, "apply", "--reject", "--verbose", "-", text=body, check=False)
        git(tree, "checkout", "-q", "--", ".")  # the hunks that did fit; the .rej files stay
        return rejected(refused.stdout + refused.stderr)
    git(tree, "commit", "-q", "-m", patch.name)
    diff = git(tree, "diff", "--no-color", "--no-ext-diff", "-U3", "HEAD~1", "HEAD").stdout
    left_out = ("diff --git", "index ", "new file")
    lines = [line for line in diff.splitlines(keepends=True) if not line.startswith(left_out)]
    if "".join(lines).split() == body.split():
        return patch.text
    return re.sub(r"(?m)^Last-Update:.*$", f"Last-Update: {today}", patch.header) + "".join(lines)


def rejected(said: str) -> list[str]:
    """The hunks that `git apply --reject --verbose` says it rejected, each with its file."""
    result: list[str] = []
    path = ""
    for file, hunk, missing in REJECTED.findall(said):
        path = file or path
        if hunk:
            result.append(f"{path}: hunk {hunk}")
        elif missing:
            result.append(missing)
    return result or [said.strip()]


def refresh(folder: Path, tree: Path, pin: Pin) -> Report:
    """Refresh the patches of `folder` against the upstream files in `tree`, which is changed; write them if all fit.

    Raises:
        BuildError: the tree lacks files that the build needs.
    """
    files = wanted_files(tree, folder / "wanted.txt")
    hashes = "".join(f"{file_sha256(path)}  {path.relative_to(tree).as_posix()}\n" for path in files)
    git(tree, "init", "-q")
    patches = read_series(folder)
    touched = {d.path for patch in patches for d in patch.diffs if (tree / d.path).exists()}
    git(tree, "add", "-f", "--", *sorted(touched))
    git(tree, "commit", "-q", "-m", "upstream")

    report = Report()
    texts: dict[str, str] = {}
    for patch in patches:
        outcome = refresh_patch(patch, tree, datetime.date.today().isoformat())
        if isinstance(outcome, list):
            report.failed[patch.name] = outcome
        else:
            (report.same if outcome == patch.text else report.moved).append(patch.name)
            texts[patch.name] = outcome
    if not report.failed:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "upstream.sha256").write_text(hashes, encoding="utf-8")
        (folder / "pin.json").write_text(json.dumps(vars(pin), indent=2) + "\n", encoding="utf-8")
    return report


def git(tree: Path, *arguments: str, text: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in the tree, untouched by the user's settings.

    Raises:
        BuildError: it fails and `check` is set.
    """
    command = ["git", "-c", "user.name=refresh", "-c", "user.email=refresh@localhost", "-c", "core.autocrlf=false"]
    done = subprocess.run([*command, *arguments], cwd=tree, input=text, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise BuildError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done


def fetch(wanted: str, pin: Pin, work: Path) -> tuple[Path, Pin]:
    """The unpacked upstream tree for what the command line names, and its pin.

    Raises:
        BuildError: it cannot be had.
    """
    source = Path(wanted)
    tree = work / "tree"
    if source.is_dir():
        # .git: a submodule's pointer would hide its files from git
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".git"))
        return tree, pin
    if not source.is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", pin.project]
        done = subprocess.run([*command, "--dest", str(work), f"{pin.project}=={wanted}"])
        found = sorted(work.glob("*.tar.gz"))
        if done.returncode != 0 or not found:
            raise BuildError(f"pip cannot get {pin.project} {wanted}")
        source = found[0]
    with tarfile.open(source) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and ".git" not in Path(m.name).parts]
        top = {m.name.partition("/")[0] for m in members}
        archive.extractall(work / "unpacked", members)
    (work / "unpacked" / top.pop()).rename(tree)
    version = source.name.removesuffix(".tar.gz").rpartition("-")[2]
    label = pin.label if version == pin.version else "ziggurat.1"
    return tree, Pin(pin.project, version, label, source.name, file_sha256(source))


def main() -> int:
    """Run from the command line; the code is 1 if a patch does not fit."""
    parser = argparse.ArgumentParser(description="Refresh the patch series against another upstream release.")
    parser.add_argument("upstream", help="a version, an archive, or a folder")
    parser.add_argument("--patches", type=Path, default=HERE, help="the patches folder (default: that of this script)")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ziggurat-refresh-"))
    try:
        tree, pin = fetch(arguments.upstream, Pin.read(arguments.patches), work)
        report = refresh(arguments.patches, tree, pin)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in report.same:
        print(f"same    {name}")
    for name in report.moved:
        print(f"moved   {name}")
    for name, reasons in report.failed.items():
        print(f"FAILED  {name}: {', '.join(reasons)}")
    if report.failed:
        print(f"nothing was written; the tree and the rejected hunks (*.rej) are in {tree}")
    else:
        print(f"written for {pin.project} {pin.version} ({pin.sha256})")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
