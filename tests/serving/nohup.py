"""launch.py, as nohup would start it."""

import os
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("launch.py")), *sys.argv[1:]])
