import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.errors import InputError
from lorary.domains.remote_ref import RemoteRef

parts = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,10}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda part: "--" not in part and ".." not in part
)
repos = st.builds("{}/{}".format, parts, parts)
revisions = st.none() | st.sampled_from(["main", "v3", "refs/pr/12", "a" * 40, "feature/x-1", "1.0.2"])


@given(repos, revisions)
def test_formatted_reference_is_parsed_back(repo, revision):
    ref = RemoteRef(repo, revision)

    assert RemoteRef.parse(str(ref)) == ref
    assert RemoteRef.parse(str(ref).removeprefix("hf://")) == ref


@pytest.mark.parametrize(
    "text",
    ["", "legal", "hf://", "hf://legal", "a/b/c", "/b", "a/", "../b", "a/..", "a--b/c", "a/b@", "a/b@../x", "a/b@x..y"]
    + [
        "a/b@-x",
        "a/b@x y",
        "a/b@x:y",
        "a/b@x+y",
        "a/b@x@y",
        "a/b@/x",
        "a b/c",
        "a/b\n",
        "a/b@v1\n",
        "http://x/y",
        "é/b",
    ],
)
def test_invalid_reference_is_refused(text):
    with pytest.raises(InputError) as raised:
        RemoteRef.parse(text)

    assert "hf://owner/lorary-legal@v2" in str(raised.value.fix)


@given(st.text(max_size=30))
def test_any_text_is_parsed_or_refused(text):
    try:
        ref = RemoteRef.parse(text)
    except InputError:
        return
    assert RemoteRef.parse(str(ref)) == ref


@pytest.mark.parametrize(
    ("revision", "version", "is_commit"),
    [(None, None, False), ("v12", 12, False), ("v0", None, False), ("main", None, False), ("0" * 40, None, True)],
)
def test_versions_and_commits_are_recognised(revision, version, is_commit):
    ref = RemoteRef("a/b", revision)

    assert (ref.version, ref.is_commit) == (version, is_commit)
