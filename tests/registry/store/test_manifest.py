import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorary.domains.errors import IncompatibleError, InputError, IntegrityError, NotFoundError
from lorary.registry.store.blobs import sha256_of
from lorary.registry.store.manifest import PackFile, PackManifest, check_path
from lorary.registry.store.strict_json import canonical_json

DIGEST = sha256_of(b"")
MISSING = object()

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
objects = st.dictionaries(texts, texts | st.integers(-9, 9) | st.lists(st.booleans()), max_size=3)
part = st.from_regex("[A-Za-z0-9_-]{1,8}", fullmatch=True)
paths = st.lists(part, min_size=2, max_size=3).map("/".join)
files = st.lists(
    st.builds(PackFile, path=paths, size=st.integers(0, 1 << 50), sha256=st.just(DIGEST), kind=texts),
    max_size=5,
    unique_by=lambda file: file.path.lower().split("/")[0],
).map(tuple)


@pytest.fixture
def manifest(draft):
    file = PackFile(path="experts/e0/adapter_config.json", size=0, sha256=DIGEST, kind="expert")
    return replace(draft, version=3, files=(file,))


def changed(manifest, path, value):
    """The manifest's JSON with one value changed; path is a list of keys and indices."""
    document = json.loads(manifest.to_json())
    target = document
    for step in path[:-1]:
        target = target[step]
    if value is MISSING:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return canonical_json(document)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(files=files, description=texts, train=objects, version=st.integers(0, 10**9))
def test_manifest_reads_back_as_the_same(draft, files, description, train, version):
    manifest = replace(draft, files=files, description=description, train=train, version=version)

    again = PackManifest.from_json(manifest.to_json(), source="x")

    assert again == manifest
    assert again.to_json() == manifest.to_json()
    assert again.digest == manifest.digest


def test_json_says_its_schema_and_hides_extra(manifest):
    document = json.loads(manifest.to_json())

    assert document["schema"] == "lorary.pack/1"
    assert "extra" not in document
    assert "extra" not in document["base"]


@pytest.mark.parametrize("change", [{"created": "later"}, {"tool": {}}, {"version": 9}, {"train": {"seed": 7}}])
def test_digest_ignores_time_tool_and_version(manifest, change):
    assert replace(manifest, **change).digest == manifest.digest


@pytest.mark.parametrize("change", [{"name": "tax"}, {"train": {"seed": 8}}, {"files": ()}, {"lineage": {"parent": 1}}])
def test_digest_covers_the_content(manifest, change):
    assert replace(manifest, **change).digest != manifest.digest


@pytest.mark.parametrize(
    ("path", "value", "cause"),
    [
        (["color"], 1, "Key 'color': is unknown"),
        (["base", "color"], 1, "Key 'base.color': is unknown"),
        (["files", 0, "color"], 1, "Key 'files[0].color': is unknown"),
        (["extra"], {}, "Key 'extra': is unknown"),
        (["license"], MISSING, "Key 'license': is missing"),
        (["version"], MISSING, "Key 'version': is missing"),
        (["base", "dtype"], MISSING, "Key 'base.dtype': is missing"),
        (["experts", 0, "rank"], MISSING, "Key 'experts[0].rank': is missing"),
        (["experts", 0, "generation"], "0", "Key 'experts[0].generation': expected int, found str '0'"),
        (["experts", 0, "generation"], -1, "Key 'experts[0]': generation cannot be -1"),
        (["experts", 0, "generation"], 1, "generation cannot be [1]"),
        (["version"], "3", "Key 'version': expected int, found str '3'"),
        (["version"], True, "Key 'version': expected int, found bool True"),
        (["version"], 3.0, "Key 'version': expected int, found float 3.0"),
        (["name"], None, "Key 'name': expected str, found NoneType None"),
        (["files"], {}, "Key 'files': expected list, found dict"),
        (["files", 0], 1, "Key 'files[0]': expected an object, found int 1"),
        (["train"], [], "Key 'train': expected dict, found list"),
        (["base", "revision"], 1, "Key 'base.revision': expected str, found int 1"),
        (["experts", 0, "layers", 1], "x", "Key 'experts[0].layers[1]': expected int, found str 'x'"),
        (["name"], "../x", "'../x' cannot be a domain name"),
        (["version"], -1, "version cannot be -1"),
        (["role"], "king", "role cannot be 'king'"),
        (["base", "weights"], "md5:1", "Key 'base': weights cannot be 'md5:1'"),
        (["files", 0, "path"], "/etc/passwd", "Key 'files[0]': path cannot be '/etc/passwd'"),
        (["files", 0, "path"], "lorary.json", "lorary.json"),
        (["files", 0, "size"], -1, "Key 'files[0]': size cannot be -1"),
        (["experts", 0, "rank"], 0, "rank cannot be 0"),
        (["experts", 0, "method"], "dora", "method cannot be 'dora'"),
        (["experts", 0, "alpha"], 0, "alpha cannot be 0.0"),
        (["experts", 0, "id"], "a/b", "id cannot be 'a/b'"),
        (["schema"], "other/1", "Key 'schema': expected 'lorary.pack/1', found 'other/1'"),
        (["schema"], MISSING, "Key 'schema'"),
        (["schema"], 1, "Key 'schema'"),
    ],
)
def test_wrong_manifest_is_refused_and_the_key_named(manifest, path, value, cause):
    with pytest.raises(IntegrityError, match="the file cannot be used") as caught:
        PackManifest.from_json(changed(manifest, path, value), source="the file")

    assert cause in str(caught.value.cause)
    assert caught.value.fix


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b"{}"])
def test_json_that_is_no_manifest_is_refused(data):
    with pytest.raises(IntegrityError, match="the file cannot be used"):
        PackManifest.from_json(data, source="the file")


@pytest.mark.parametrize("schema", ["lorary.pack/2", "lorary.pack/2.1", "lorary.pack/10"])
def test_higher_major_schema_is_incompatible(manifest, schema):
    with pytest.raises(IncompatibleError) as caught:
        PackManifest.from_json(changed(manifest, ["schema"], schema), source="x")

    assert schema in str(caught.value.cause)
    assert "upgrade" in str(caught.value.fix)


@pytest.mark.parametrize("place", [[], ["base"], ["files", 0], ["experts", 0]])
def test_keys_of_a_higher_minor_schema_are_kept_and_written_back(manifest, place):
    document = json.loads(changed(manifest, ["schema"], "lorary.pack/1.3"))
    target = document
    for step in place:
        target = target[step]
    target["color"] = {"a": [1]}
    target["extra"] = 5
    data = canonical_json(document)

    again = PackManifest.from_json(data, source="x")

    assert again.to_json() == data
    assert PackManifest.from_json(again.to_json(), source="x") == again


def test_extra_keys_need_a_higher_minor_schema(manifest):
    with pytest.raises(ValueError, match="extra"):
        replace(manifest, extra={"color": 1})


def test_extra_keys_cannot_hide_our_own(manifest):
    with pytest.raises(ValueError, match="extra"):
        replace(manifest, schema="lorary.pack/1.3", extra={"name": "other"})


@pytest.mark.parametrize(
    "path", ["a", "README.md", "experts/e0/adapter_model.safetensors", ".gitattributes", "a" * 255]
)
def test_good_path_is_returned_as_it_came(path):
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path",
    ["", "/a", "a/", "a//b", "..", "a/../b", ".", "./a", "a\\b", "C:/a", "a b", "é", "a\n", "a\0", "~/a", "a" * 256]
    + ["a.", "a./b", "...", "a ", "CON", "nul.json", "a/Com1.txt/b", "//server/share", "\\\\server\\share", "a:stream"],
)
def test_path_that_leads_elsewhere_is_refused(path):
    with pytest.raises(ValueError, match="path cannot be"):
        PackFile(path=path, size=0, sha256=DIGEST, kind="x")


@pytest.mark.parametrize("pair", [("a", "a"), ("a", "A"), ("a", "a/b"), ("A", "a/b/c"), ("a/b", "a/b/c")])
def test_files_that_do_not_fit_into_one_folder_are_refused(draft, pair):
    files = tuple(PackFile(path=path, size=0, sha256=DIGEST, kind="x") for path in pair)

    with pytest.raises(ValueError, match="files cannot be"):
        replace(draft, files=files)


def test_two_experts_with_one_id_are_refused(draft):
    with pytest.raises(ValueError, match="experts"):
        replace(draft, experts=draft.experts * 2)


def test_reserved_name_is_refused(draft):
    with pytest.raises(InputError):
        replace(draft, name="latest")


def test_file_is_found_by_path(manifest):
    assert manifest.file("experts/e0/adapter_config.json") == manifest.files[0]


def test_unknown_file_is_not_found_and_the_known_are_listed(manifest):
    with pytest.raises(NotFoundError) as caught:
        manifest.file("README.md")

    assert "README.md" in caught.value.message
    assert "experts/e0/adapter_config.json" in str(caught.value.cause)


def test_manifest_too_large_to_be_read_is_not_written(manifest):
    with pytest.raises(ValueError, match="at most"):
        replace(manifest, description="x" * (4 << 20)).to_json()
