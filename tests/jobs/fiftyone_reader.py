"""Opens COCO instances in FiftyOne and prints what it has found: run by the Python of FiftyOne's own environment.

Usage: python fiftyone_reader.py IMAGES INSTANCES.json
"""

import json
import sys

import fiftyone

images, instances = sys.argv[1:]
dataset = fiftyone.Dataset.from_dir(
    dataset_type=fiftyone.types.COCODetectionDataset,
    data_path=images,
    labels_path=instances,
    label_types=["segmentations"],
    include_id=True,
)
dataset.compute_metadata()
(field,) = dataset.get_field_schema(embedded_doc_type=fiftyone.Detections)
found = {}
for sample in dataset:
    detections = sample[field].detections if sample[field] else []
    size_wh = sample.metadata.width, sample.metadata.height
    found[sample.filepath] = [
        {
            "category": one.label,
            "area": int(one.mask.sum()),
            "bbox": [part * size_wh[n % 2] for n, part in enumerate(one.bounding_box)],
        }
        for one in detections
    ]
# Beside it stands what FiftyOne says of its progress.
print("FOUND", json.dumps(found))
