"""octavo.server.main by parts; as a whole it is tried in tests/serving."""

import resource
import subprocess
import sys

FILES = """
import resource
from octavo.server.main import _allow_files
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 2048))
_allow_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_a_server_may_open_as_many_files_as_it_can() -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 2048
    done = subprocess.run([sys.executable, "-c", FILES], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["2048", "2048"]
