"""How good are a bundle's labels? Needs ``pip install '.[data]'``, but no torch."""

from argparse import ArgumentParser

from zsseg_rt import Bundle, Engine
from zsseg_rt.evaluation import EngineSegmenter, create_dataset, evaluate

parser = ArgumentParser(description=__doc__)
parser.add_argument(
    "folder", help="images/, masks/ and classes.txt; python -m tools.scenes FOLDER draws one"
)
arguments = parser.parse_args()

dataset = create_dataset("folder", arguments.folder, "val")
with Engine(Bundle.demo("scenes")) as engine:
    evaluation = evaluate(EngineSegmenter(engine, dataset.class_names), dataset)

for figure, percent in evaluation.scores.as_reported().items():
    print(f"{figure}: {percent:.1f} %")
worst = min(evaluation.class_table(), key=lambda row: row["iou_percent"] or 0.0)
print(f"hardest: {worst['name']}")
