"""How good are a bundle's labels? Needs ``pip install '.[data]'`` in a checkout, but no torch."""

from argparse import ArgumentParser

from zsseg_rt import Bundle, Engine
from zsseg_rt.evaluation import EngineSegmenter, create_dataset, evaluate

ArgumentParser(description=__doc__).parse_args()

# The synthetic world needs no files; create_dataset("folder", "my_photos", "val") reads yours.
dataset = create_dataset("scenes", split="val", length=8)
with Engine(Bundle.demo("scenes")) as engine:
    evaluation = evaluate(EngineSegmenter(engine, dataset.class_names), dataset)

for figure, percent in evaluation.scores.as_reported().items():
    print(f"{figure}: {percent:.1f} %")
worst = min(evaluation.class_table(), key=lambda row: row["iou_percent"] or 0.0)
print(f"hardest: {worst['name']}")
