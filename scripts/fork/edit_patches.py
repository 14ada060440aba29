"""Turns patches/ into a git tree for editing, one commit per patch, and writes patches/ back from it."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.fork.fork_wheel import (
    PATCHES,
    ArgumentParser,
    ForkError,
    Pin,
    add_new_files,
    apply_patch,
    new_files,
    patch_files,
    read_pin,
    require_modules,
    run_command,
    run_git,
    unpack,
    upstream_wheel,
)

HEADER_FIELDS = ("What", "Why", "Upstream", "Test")
NEW_FILES_SUBJECT = "Files that only the fork has (patches/new)"

DESCRIPTION = """\
  edit_patches.sh open DIR   makes DIR, a git tree: upstream's diffusers {version}, then the files of patches/new,
                             then one commit per patch
  edit_patches.sh save DIR   writes patches/ from the commits of DIR
"""

EPILOG = """\
To change a patch, change its commit; `git rebase -i` and `git commit --fixup` work as ever:
  scripts/fork/edit_patches.sh open /tmp/fork && cd /tmp/fork
  $EDITOR diffusers/models/attention.py
  git commit --all --fixup :/'Subject of the patch' && git rebase -i --autosquash --root
  PYTHONPATH=/tmp/fork python -m pytest ...          # try it without installing
  cd - && scripts/fork/edit_patches.sh save /tmp/fork && git diff patches/

A commit is a patch; the order of the commits is the order of the patches, its subject gives the file its name. The
message says what the patch does and has the fields What:, Why:, Upstream: and Test:. A file that upstream does not
have goes whole into patches/new, whichever commit adds it. Before anything is written, the patches are applied to
upstream and must give the tree that was saved. `open` then `save` without a change in between changes nothing.
"""

# All that could make the same commit read differently on another host.
DIFF_OPTIONS = [
    "--patch",
    "--no-commit-id",
    "--full-index",
    "--no-renames",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--unified=3",
    "--inter-hunk-context=0",
    "--diff-algorithm=myers",
    "--indent-heuristic",
    "--src-prefix=a/",
    "--dst-prefix=b/",
]
IDENTITY = ("-c", "user.name=diffusers-npu", "-c", "user.email=diffusers-npu@localhost")


def git(tree: Path, *arguments: str, stdin: str = "") -> str:
    result = run_git(tree, *IDENTITY, *arguments, stdin=stdin.encode())
    if result.returncode:
        raise ForkError(f"git {arguments[0]} in {tree} failed: {result.stderr.decode().strip()}")
    return result.stdout.decode()


# --- open --------------------------------------------------------------------------------------------------------


def open_tree(pin: Pin, wheel: Path | None, tree: Path) -> None:
    """Makes `tree` whole or not at all: a tree without the last patches would lose them when saved."""
    if tree.exists():
        raise ForkError(f"{tree} exists already; name a new directory")
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
        draft = Path(scratch, "tree")
        unpack(upstream_wheel(pin, wheel), draft)
        git(draft, "init", "--quiet", "--initial-branch=main", "--template=")
        git(draft, "config", "core.autocrlf", "false")
        draft.joinpath(".git", "info").mkdir()
        draft.joinpath(".git", "info", "exclude").write_text("__pycache__/\n")
        commit(draft, f"diffusers {pin.version}")
        if new_files(PATCHES):
            add_new_files(PATCHES, draft)
            commit(draft, NEW_FILES_SUBJECT)
        for patch in patch_files(PATCHES):
            apply_patch(patch, draft)
            commit(draft, header(patch))
        draft.rename(tree)
    print(f"{tree}: {len(patch_files(PATCHES))} patches on diffusers {pin.version}")


def commit(tree: Path, message: str) -> None:
    git(tree, "add", "--all", "--force", ".", ":(exclude)*.pyc")
    git(tree, "commit", "--quiet", "--cleanup=whitespace", "--file=-", stdin=message)


def header(patch: Path) -> str:
    """What the patch says about itself: all that stands before its first diff."""
    text = patch.read_bytes().decode()
    return text[: text.index("diff --git ")]


# --- save --------------------------------------------------------------------------------------------------------


def save_tree(pin: Pin, wheel: Path | None, tree: Path) -> None:
    root, commits = survey(tree)
    upstream = list_files(tree, root)
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch, "patches")
        for path in list_files(tree, "HEAD") - upstream:
            target = draft / "new" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(run_git(tree, "show", f"HEAD:{path}").stdout)
        draft.mkdir(exist_ok=True)
        for revision in commits:
            write_patch(tree, revision, upstream, draft)
        must_rebuild(tree, draft, upstream_wheel(pin, wheel), Path(scratch, "rebuilt"))
        replace_files(draft)
    print(f"patches/: {len(patch_files(PATCHES))} patches, {len(new_files(PATCHES))} new files")


def survey(tree: Path) -> tuple[str, list[str]]:
    """The first commit of `tree`, which is upstream, and the commits after it in order."""
    if not tree.joinpath(".git").is_dir():
        raise ForkError(f"{tree} is no git tree; make one with: edit_patches.sh open {tree}")
    if changes := git(tree, "status", "--porcelain"):
        raise ForkError(f"{tree} has changes that are in no commit:\n{changes.rstrip()}")
    roots = git(tree, "rev-list", "--max-parents=0", "HEAD").split()
    if len(roots) != 1 or git(tree, "rev-list", "--min-parents=2", "HEAD"):
        raise ForkError(f"the history of {tree} is not a line of commits on upstream's; git rebase makes it one")
    return roots[0], git(tree, "rev-list", "--reverse", f"{roots[0]}..HEAD").split()


def list_files(tree: Path, revision: str) -> set[str]:
    return set(git(tree, "ls-tree", "-r", "-z", "--name-only", "--full-tree", revision).split("\0")[:-1])


def write_patch(tree: Path, revision: str, upstream: set[str], folder: Path) -> None:
    """Writes what the commit changes in the files of `upstream` as the next patch of `folder`."""
    subject, slug = git(tree, "log", "-1", "--format=%s%n%f", revision).split("\n")[:2]
    changed = git(tree, "diff-tree", "-r", "-z", "--no-commit-id", "--no-renames", "--name-only", revision)
    files = [name for name in changed.split("\0")[:-1] if name in upstream]
    if not files:
        print(f"{subject}: all of it is in patches/new")
        return
    message = git(tree, "log", "-1", "--format=%B", revision).strip()
    missing = [field for field in HEADER_FIELDS if not re.search(rf"^{field}: *\S", message, re.MULTILINE)]
    if missing:
        raise ForkError(f"the commit {subject!r} does not say {', '.join(f'{field}:' for field in missing)}")
    diff = git(tree, "--literal-pathspecs", "diff-tree", *DIFF_OPTIONS, revision, "--", *files)
    words = re.match(r".{1,60}(?=-|$)|.{1,60}", slug.lower())
    assert words, "git gives every commit a slug, and a commit without a subject has been refused"
    name = f"{len(patch_files(folder)) + 1:04}-{words[0]}.patch"
    (folder / name).write_bytes(f"{message}\n\n{diff}".encode())
    print(name)


def must_rebuild(tree: Path, patches: Path, upstream: Path, rebuilt: Path) -> None:
    """Raises unless upstream with `patches` is what `tree` holds."""
    unpack(upstream, rebuilt)
    for patch in patch_files(patches):
        apply_patch(patch, rebuilt)
    add_new_files(patches, rebuilt)
    git(rebuilt, "init", "--quiet", "--template=")
    git(rebuilt, "add", "--all", "--force")
    git(rebuilt, "fetch", "--quiet", "--depth=1", str(tree.resolve()), "HEAD")
    if difference := git(rebuilt, "diff-index", "--cached", "--name-only", "FETCH_HEAD"):
        raise ForkError(
            f"upstream with the patches of {tree} is not what {tree} holds; patches/ is as it was. They differ in:\n"
            f"{difference.rstrip()}"
        )


def replace_files(draft: Path) -> None:
    """Makes the patches and new files in patches/ those of `draft`; an unchanged file is not written."""
    wanted = {path.relative_to(draft): path for path in patch_files(draft) + new_files(draft)}
    present = {path.relative_to(PATCHES): path for path in patch_files(PATCHES) + new_files(PATCHES)}
    for name in present.keys() - wanted.keys():
        present[name].unlink()
    for name, source in wanted.items():
        target = PATCHES / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".tmp")
            shutil.copyfile(source, temporary)
            temporary.replace(target)


# --- the command line --------------------------------------------------------------------------------------------


def parse_arguments(pin: Pin) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="edit_patches.sh",
        description=DESCRIPTION.format(version=pin.version),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["open", "save"])
    parser.add_argument("tree", metavar="DIR", type=Path)
    parser.add_argument("--wheel", metavar="FILE", type=Path, help="upstream's wheel, instead of asking pip for it")
    return parser.parse_args()


def main() -> int:
    pin = read_pin()
    arguments = parse_arguments(pin)
    require_modules("pip")
    {"open": open_tree, "save": save_tree}[arguments.action](pin, arguments.wheel, arguments.tree)
    return 0


if __name__ == "__main__":
    run_command("edit_patches.sh", main)
