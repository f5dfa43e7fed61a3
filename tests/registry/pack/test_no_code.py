"""No code comes with a pack: while packs are checked and loaded, nothing is unpickled, run, imported or connected."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

# what `pickle` would run; torch.load would find it in any of the files
PAYLOAD = b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR."
MORE = [
    "adapter_model.bin",
    "training_args.pt",
    "evil.py",
    "index.pkl",
    "a.ckpt",
    "optimizer.pth",
    "__init__.py",
    "x.faiss",
]

WATCHED = """
import sys
from pathlib import Path
import torch
from lorary.registry.pack.check_pack import check_pack
from lorary.registry.pack.pack_source import PackFolder
from lorary.domains.errors import LoraryError

warm, *folders = sys.argv[1:]
source = PackFolder(Path(warm))
check_pack(source, source.manifest())  # whatever is imported on first use is imported now

BANNED = ("pickle.", "exec", "compile", "import", "subprocess.", "socket.", "os.system", "os.exec", "os.fork",
          "os.spawn", "os.posix_spawn", "marshal.", "ctypes.dlopen", "code.__new__", "urllib.", "builtins.input")
seen, watching = [], False

def hook(event, arguments):
    if watching and event.startswith(BANNED):
        seen.append((event, str(arguments)[:200]))

sys.addaudithook(hook)
watching, verdicts = True, []
for folder in folders:
    source = PackFolder(Path(folder))
    try:
        manifest = source.manifest()
        source.check_nothing_else(manifest)
        check_pack(source, manifest)
        verdicts.append("accepted")
    except LoraryError as error:
        verdicts.append("refused")
watching = False
print(seen)
print(verdicts)
"""


def test_nothing_is_run_imported_or_connected_while_packs_are_checked(loose: Any, tmp_path: Path) -> None:
    packs = [loose()]
    packs += [loose().with_files(**{name: PAYLOAD}) for name in MORE]
    packs += [loose().with_files(**{path: PAYLOAD}) for path in loose().files]
    packs += [loose().with_files(**{path: data[: len(data) // 2]}) for path, data in loose().files.items()]
    folders = [tmp_path / str(number) for number in range(len(packs))]
    for folder, pack in zip(folders, packs, strict=True):
        pack.write_to(folder)

    command = [sys.executable, "-c", WATCHED, *map(str, [folders[0], *folders])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    seen, verdicts = done.stdout.splitlines()
    assert seen == "[]"
    assert ast.literal_eval(verdicts) == ["accepted"] + ["refused"] * (len(packs) - 1)
    assert not (tmp_path / "owned").exists()
