"""MedMNIST's 2D datasets of 28x28 pixels (Yang et al. 2023), except ChestMNIST, which is multi-label.

Names, MD5 and numbers of images are from the medmnist package, version 3.0.2 (`medmnist/info.py`), which publishes no
sizes. Each dataset is one npz file with training, validation and test splits.
"""

import math
from typing import NamedTuple

from dist_mnist.data.sources.known.records import Conversion, KnownDataset, KnownFile, Location, Part

ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
    "pancreas", "spleen",
)  # fmt: skip


class Entry(NamedTuple):
    """The facts about one MedMNIST dataset."""

    md5: str
    num_train: int
    num_validation: int
    class_names: tuple[str, ...]


ENTRIES = {
    "pathmnist": Entry(
        "a8b06965200029087d5bd730944a56c1", 89_996, 10_004,
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
         "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    ),
    "dermamnist": Entry(
        "0744692d530f8e62ec473284d019b0c7", 7_007, 1_003,
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
         "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
    ),
    "octmnist": Entry(
        "c68d92d5b585d8d81f7112f81e2d0842", 97_477, 10_832,
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    ),
    "pneumoniamnist": Entry("28209eda62fecd6e6a2d98b1501bb15f", 4_708, 524, ("normal", "pneumonia")),
    "retinamnist": Entry("bd4c0672f1bba3e3a89f0e4e876791e4", 1_080, 120, tuple("01234")),
    "breastmnist": Entry("750601b1f35ba3300ea97c75c52ff8f6", 546, 78, ("malignant", "normal, benign")),
    "bloodmnist": Entry(
        "7053d0359d879ad8a5505303e11de1dc", 11_959, 1_712,
        ("basophil", "eosinophil", "erythroblast",
         "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
         "platelet"),
    ),
    "tissuemnist": Entry(
        "ebe78ee8b05294063de985d821c1c34b", 165_466, 23_640,
        ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
         "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
         "Thick Ascending Limb"),
    ),
    "organamnist": Entry("68e3f8846a6bd62f0c9bf841c0d9eacc", 34_561, 6_491, ORGANS),
    "organcmnist": Entry("b9ceb9546e10131b32923c5bbeaea2b1", 12_975, 2_392, ORGANS),
    "organsmnist": Entry("9ab87b696fb54e2a387ebe992d6ed5f1", 13_932, 2_452, ORGANS),
}  # fmt: skip


def _medmnist(name: str, entry: Entry) -> KnownDataset:
    def part(split: str) -> Part:
        return Part(Location(f"{name}.npz", f"{split}_images"), Location(f"{name}.npz", f"{split}_labels"))

    # Rounded up: `IdxDataset.split` rounds the number of images down.
    fraction = math.ceil(1e6 * entry.num_validation / (entry.num_train + entry.num_validation)) / 1e6
    return KnownDataset(
        name=name,
        class_names=entry.class_names,
        mirrors=("https://zenodo.org/records/10519652/files/",),
        files=(KnownFile(name=f"{name}.npz", num_bytes=None, checksum=f"md5:{entry.md5}"),),
        conversion=Conversion(splits={"train": (part("train"), part("val")), "t10k": (part("test"),)}),
        note=(
            f"the published validation split is the last {entry.num_validation} training images: train with "
            f"--validation-split last --validation-fraction {fraction:.6f} to validate on it"
        ),
    )


MEDMNIST = tuple(_medmnist(name, entry) for name, entry in ENTRIES.items())
