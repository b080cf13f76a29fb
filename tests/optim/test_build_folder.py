"""The folder of built libraries: nothing is loaded that another user could have put there."""

import os
from pathlib import Path

import pytest

from deepspeed_acco.optim import build_folder

STRANGER = 54321  # no user of this machine


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that TORCH_EXTENSIONS_DIR names; the user's own cache is ``home/.cache/torch_extensions``."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    (tmp_path / "home").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def give_away(monkeypatch):
    """``give_away(path)``: it belongs to another user from now on; without root's rights the test changes its own."""

    def give(path):
        if os.geteuid() == 0:
            os.chown(path, STRANGER, -1, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: STRANGER)

    return give


def _own(tmp_path) -> Path:
    return tmp_path / "home" / ".cache" / "torch_extensions" / "kernels"


def test_a_new_folder_is_the_users_alone(cache, capsys):
    folder = build_folder.trusted_folder("kernels")
    assert folder == cache / "kernels" and folder.stat().st_mode & 0o777 == 0o700
    assert build_folder.trusted_folder("kernels") == folder
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_others_can_write_to_is_told_and_not_taken(cache, tmp_path, capsys, monkeypatch):
    build_folder.trusted_folder("kernels").chmod(0o777)
    assert build_folder.trusted_folder("kernels") == _own(tmp_path)
    line = capsys.readouterr().err
    assert f"ACCO: {cache}/kernels can be written by other users and is not trusted" in line and str(tmp_path) in line
    assert line.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert build_folder.trusted_folder("kernels") == _own(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("mode", "is_trusted"), [(0o777, False), (0o1777, True), (0o775, True), (0o755, True)])
def test_a_root_may_be_shared_where_nobody_moves_what_is_anothers(cache, tmp_path, mode, is_trusted):
    cache.mkdir()
    cache.chmod(mode)
    assert build_folder.trusted_folder("kernels") == (cache / "kernels" if is_trusted else _own(tmp_path))


def test_the_users_own_link_is_followed(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.mkdir()
    (cache / "kernels").symlink_to(tmp_path / "elsewhere")
    assert build_folder.trusted_folder("kernels") == cache / "kernels"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give something to another user")
@pytest.mark.parametrize("what", ["root", "folder", "link"])
def test_what_belongs_to_another_user_is_not_taken(cache, tmp_path, give_away, capsys, what):
    folder = build_folder.trusted_folder("kernels")
    if what == "link":
        (tmp_path / "planted").mkdir(mode=0o700)
        folder.rmdir()
        folder.symlink_to(tmp_path / "planted")
    give_away({"root": cache, "folder": folder, "link": folder}[what])
    assert build_folder.trusted_folder("kernels") == _own(tmp_path)
    assert f"belongs to user {STRANGER} and is not trusted" in capsys.readouterr().err


def test_where_all_belongs_to_another_user_there_is_no_folder(cache, tmp_path, give_away):
    build_folder.trusted_folder("kernels")
    for path in (cache, _own(tmp_path).parent):
        path.mkdir(parents=True, exist_ok=True)
        give_away(path)
    with pytest.raises(RuntimeError, match="belongs to user .* set TORCH_EXTENSIONS_DIR to a folder of your own"):
        build_folder.trusted_folder("kernels")


def test_a_library_is_loadable_only_as_it_was_put(tmp_path, give_away):
    built, library = tmp_path / "built.so", tmp_path / "kernels.so"
    assert "there is none" in build_folder.why_not_loadable(library)
    built.write_bytes(b"code" * 100)
    build_folder.put(built, library)
    assert build_folder.why_not_loadable(library) == "" and not built.exists()
    library.chmod(0o666)
    assert "can be written by other users" in build_folder.why_not_loadable(library)
    library.chmod(0o600)
    give_away(library)
    assert "belongs to user" in build_folder.why_not_loadable(library)


def test_a_library_of_another_build_is_not_loadable(tmp_path):
    library = tmp_path / "kernels.so"
    for content in (b"first", b"second"):
        (tmp_path / "built.so").write_bytes(content)
        build_folder.put(tmp_path / "built.so", library)
    library.write_bytes(b"first")
    assert build_folder.why_not_loadable(library) == f"{library} is cut or was changed"
