"""Write rows of the infilling task: generated stories under keys that training never uses.

python recipes/infilling_rows.py > src/amortlm/lab/tasks/stories.jsonl
python recipes/infilling_rows.py --first 620 --rows 960 > runs/more-stories.jsonl
"""

from __future__ import annotations

import argparse
import json

from embedded.stories import story

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--first", type=int, default=0)
parser.add_argument("--rows", type=int, default=620, help="default: 20 of the task, 600 of the experiment")
args = parser.parse_args()

for index in range(args.first, args.first + args.rows):
    sentences = story(f"infilling task/{index}").sentences
    row = {"x": " ".join(sentences[:3]), "y": sentences[4], "gold": " " + sentences[3]}
    print(json.dumps(row))
