import re

import pytest
from llama_patches import diff
from llama_patches.errors import BuildError
from llama_patches.series import apply_series, read_patch, read_series, series_names

# A patch is a hook: what is taken from upstream is what a new release conflicts with. Raise these with a reason.
REMOVED_LINES = 110  # a quarter of them: one word each in 0007
ADDED_LINES = 170  # 74 of them hook KV budgets in, 0008 to 0011


def contents(tree):
    return {path.relative_to(tree): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


def test_series_and_files_agree(patches):
    assert sorted(series_names(patches)) == sorted(path.name for path in patches.glob("*.patch"))


@pytest.mark.parametrize("field", ["Description", "Author", "Forwarded", "Last-Update", "Remove when"])
def test_every_header_is_complete(patches, field):
    for patch in read_series(patches):
        assert patch.fields.get(field), f"{patch.name} has no {field!r}"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", patch.fields["Last-Update"]) for patch in read_series(patches))


def test_the_patches_are_small(patches):
    counts = [diff.counts(patch.diffs) for patch in read_series(patches)]
    assert sum(removed for removed, _ in counts) <= REMOVED_LINES
    assert sum(added for _, added in counts) <= ADDED_LINES


def test_no_patch_creates_a_file(patches):
    assert not [d.path for patch in read_series(patches) for d in patch.diffs if d.creates or d.removes]


def test_the_series_applies_to_the_pin_and_only_once(patches, touched):
    series = read_series(patches)
    before = contents(touched)
    assert apply_series(series, touched) == len(series)
    after = contents(touched)
    assert all(before[path] != after[path] for path in before)
    assert apply_series(series, touched) == 0
    assert contents(touched) == after


def test_a_series_that_is_half_applied_is_completed(patches, touched):
    series = read_series(patches)
    for count in range(len(series)):
        assert apply_series(series[: count + 1], touched) == 1
    assert apply_series(series, touched) == 0


def test_a_damaged_patch_is_refused_by_name_and_hunk_and_nothing_changes(own_patches, touched):
    name = series_names(own_patches)[2]
    path = own_patches / name
    lines = path.read_text().splitlines(keepends=True)
    second_hunk = [i for i, line in enumerate(lines) if line.startswith("@@")][1]
    lines[second_hunk + 1] = lines[second_hunk + 1].rstrip("\n") + " damaged\n"
    path.write_text("".join(lines))
    before = contents(touched)
    with pytest.raises(
        BuildError, match=rf"^{re.escape(name)}: hunk 2 of vendor/llama.cpp/\S+ does not fit at line \d+$"
    ):
        apply_series(read_series(own_patches), touched)
    assert contents(touched) == before


def test_a_missing_patch_is_named(own_patches):
    name = series_names(own_patches)[1]
    (own_patches / name).unlink()
    with pytest.raises(BuildError, match=re.escape(name)):
        read_series(own_patches)


FILE = "one\ntwo\nthree\nfour\nfive\n"
PATCH = """Description: a test

--- a/f.txt
+++ b/f.txt
@@ -2,3 +2,4 @@
 two
-three
+3
+3.5
 four
"""


def apply(patch, text):
    tree = diff.Tree({"f.txt": text.splitlines(keepends=True)})
    diff.apply("p", read_patch("p", patch).diffs, tree)
    lines = tree.texts["f.txt"]
    return None if lines is None else "".join(lines)


def test_a_hunk_replaces_its_lines():
    assert apply(PATCH, FILE) == "one\ntwo\n3\n3.5\nfour\nfive\n"
    assert diff.counts(read_patch("p", PATCH).diffs) == (1, 2)


def test_the_reverse_undoes():
    reverse = tuple(d.reversed() for d in read_patch("p", PATCH).diffs)
    tree = diff.Tree({"f.txt": apply(PATCH, FILE).splitlines(keepends=True)})
    diff.apply("p", reverse, tree)
    assert "".join(tree.texts["f.txt"]) == FILE


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("zero\n" + FILE, id="offset"),
        pytest.param(FILE.replace("two", "TWO"), id="context"),
        pytest.param(FILE.replace("two", "two "), id="white space"),
        pytest.param("one\ntwo\n", id="short file"),
    ],
)
def test_neither_fuzz_nor_offset(text):
    with pytest.raises(BuildError, match=r"^p: hunk 1 of f.txt does not fit at line 2$"):
        apply(PATCH, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("@@ -2,3 +2,4 @@", "@@ -2,3 +2,5 @@"), "p: hunk 1: its lines are not the 3 old and 5 new"),
        (("@@ -2,3 +2,4 @@", "@@ what @@"), "p: hunk 1: malformed head"),
        (("a/f.txt\n+++ b/f.txt", "a/../f\n+++ b/../f"), "is not a path of the form"),
        (("--- a", "=== a"), "p: no diff"),
    ],
)
def test_a_malformed_patch_is_refused(change, message):
    with pytest.raises(BuildError, match=re.escape(message)):
        read_patch("p", PATCH.replace(*change))


def test_a_created_file():
    patch = "--- /dev/null\n+++ b/f.txt\n@@ -0,0 +1,2 @@\n+a\n+b\n"
    tree = diff.Tree({"f.txt": None})
    diff.apply("p", read_patch("p", patch).diffs, tree)
    assert tree.texts["f.txt"] == ["a\n", "b\n"]
    with pytest.raises(BuildError, match="f.txt exists already"):
        apply(patch, FILE)


def test_a_header_field_goes_on_over_lines():
    text = "Description: a\n b\n .\nRemove when: c\n\n" + PATCH[PATCH.index("--- a") :]
    patch = read_patch("p", text)
    assert patch.fields == {"Description": "a\nb\n.", "Remove when": "c"}
    assert patch.text.startswith(patch.header)
