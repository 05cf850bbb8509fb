"""Fetching pinned packages with pip, from a folder of packages that the tests make."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from lib.package_index import PackageIndexError, fetch_package


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, the only place where pip looks; no index, no configuration of this machine."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_REQUIRE_HASHES", "PIP_CONSTRAINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return folder


def make_wheel(shop: Path, *, version: str = "1.0", needs: str = "") -> str:
    """Put a wheel into the shop; its SHA-256."""
    path = shop / f"goods-{version}-py3-none-any.whl"
    about = f"goods-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("goods/data.bin", version)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: goods\nVersion: {version}\n{needs}")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_source(shop: Path, *, ran: Path) -> str:
    """Put a source distribution into the shop whose build code leaves the file `ran`; its SHA-256."""
    about = "Metadata-Version: 2.1\nName: goods\nVersion: 1.0\n"
    backend = (
        "import os\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    os.mkdir(os.path.join(folder, 'goods-1.0.dist-info'))\n"
        "    with open(os.path.join(folder, 'goods-1.0.dist-info', 'METADATA'), 'w') as file:\n"
        f"        file.write({about!r})\n"
        "    return 'goods-1.0.dist-info'\n"
        "def build_wheel(folder, settings=None, metadata=None):\n"
        "    raise NotImplementedError\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    path = shop / "goods-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"PKG-INFO": about, "backend.py": backend, "pyproject.toml": project}.items():
            entry = tarfile.TarInfo(f"goods-1.0/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched(shop: Path, tmp_path: Path) -> None:
    make_wheel(shop, version="1.1")
    make_source(shop, ran=tmp_path / "ran")
    digest = make_wheel(shop, needs="Requires-Dist: something-else\n")
    file = fetch_package(requirement="goods==1.0", sha256=digest, folder=tmp_path / "new" / "here", source=False)
    assert file == tmp_path / "new" / "here" / "goods-1.0-py3-none-any.whl"
    assert file.read_bytes() == (shop / file.name).read_bytes()
    assert list(file.parent.iterdir()) == [file]


def test_a_source_distribution_is_fetched(shop: Path, tmp_path: Path) -> None:
    make_wheel(shop)
    digest = make_source(shop, ran=tmp_path / "ran")
    file = fetch_package(requirement="goods==1.0", sha256=digest, folder=tmp_path / "here", source=True)
    assert file == tmp_path / "here" / "goods-1.0.tar.gz"
    assert file.read_bytes() == (shop / file.name).read_bytes()


def test_another_file_is_refused_with_both_hashes(shop: Path, tmp_path: Path) -> None:
    digest = make_wheel(shop)
    with pytest.raises(PackageIndexError) as refused:
        fetch_package(requirement="goods==1.0", sha256="0" * 64, folder=tmp_path / "here", source=False)
    assert "0" * 64 in str(refused.value)
    assert digest in str(refused.value)
    assert list((tmp_path / "here").iterdir()) == []


def test_no_code_of_a_package_runs_before_its_hash_is_checked(shop: Path, tmp_path: Path) -> None:
    """pip asks a source distribution's own build code for its metadata."""
    digest, ran = make_source(shop, ran=tmp_path / "ran"), tmp_path / "ran"
    with pytest.raises(PackageIndexError) as refused:
        fetch_package(requirement="goods==1.0", sha256="0" * 64, folder=tmp_path / "here", source=True)
    assert digest in str(refused.value)
    assert not ran.exists()


@pytest.mark.parametrize("source", [False, True])
def test_a_version_that_is_not_there(source: bool, shop: Path, tmp_path: Path) -> None:
    make_wheel(shop, version="2.0")
    with pytest.raises(PackageIndexError, match=r"^goods==1\.0: ") as refused:
        fetch_package(requirement="goods==1.0", sha256="0" * 64, folder=tmp_path / "here", source=source)
    assert "Traceback" not in str(refused.value)
    assert ("network" in str(refused.value)) == source, "where other versions are found, the network is there"


def test_a_package_that_is_not_there(tmp_path: Path) -> None:
    """pip says the same of a name that nobody has and of an index that it cannot reach."""
    with pytest.raises(PackageIndexError, match=r"^goods==1\.0: .*name"):
        fetch_package(requirement="goods==1.0", sha256="0" * 64, folder=tmp_path / "here", source=False)


def test_no_network(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(PackageIndexError, match="goods==1.0: .*network"):
        fetch_package(requirement="goods==1.0", sha256="0" * 64, folder=tmp_path / "here", source=False)


def test_other_files_in_the_folder_do_no_harm(shop: Path, tmp_path: Path) -> None:
    digest = make_wheel(shop)
    other = tmp_path / "here" / "other-1.0-py3-none-any.whl"
    other.parent.mkdir()
    other.write_bytes(b"not asked for")
    file = fetch_package(requirement="goods==1.0", sha256=digest, folder=other.parent, source=False)
    assert file.name == "goods-1.0-py3-none-any.whl"
