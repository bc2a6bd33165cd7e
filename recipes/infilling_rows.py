"""Write the rows of the infilling task: generated stories under keys that training never uses.

python recipes/infilling_rows.py > src/amortlm/tasks/stories.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "embedded"))

from stories import story

ROWS = 620  # 20 of the task, 600 of the experiment

for index in range(ROWS):
    sentences = story(f"infilling task/{index}").sentences
    row = {"x": " ".join(sentences[:3]), "y": sentences[4], "gold": " " + sentences[3]}
    print(json.dumps(row))
