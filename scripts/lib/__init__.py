"""What several programs of scripts/ share, one subject a file.

Importing it puts the checkout on sys.path, so that a program finds plumbing and the trainers from
wherever it is started. Modules that need torch say so; reading results and making tables does not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
