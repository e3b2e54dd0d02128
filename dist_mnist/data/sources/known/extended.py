"""The datasets that extend MNIST: the six splits of EMNIST, QMNIST and Kuzushiji-49.

- EMNIST (Cohen et al. 2017): one archive has all six; size and SHA-256 are from the TensorFlow Datasets project, and
  torchvision has its MD5.
- QMNIST (Yadav and Bottou 2019): MD5 from torchvision; sizes from DataLad's index, whose keys have the same MD5.
- Kuzushiji-49 (Clanuwat et al. 2018): MD5 and sizes from DataLad's index; the project publishes none.
"""

from string import ascii_uppercase, digits

from dist_mnist.data.sources.known.records import Conversion, KnownDataset, KnownFile, Location, Part

EMNIST_ARCHIVE = KnownFile(
    name="gzip.zip",
    num_bytes=561_753_746,
    checksum="sha256:fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
)
# Lower-case letters that differ from their capitals; all others share a class with them.
DIFFERENT = "abdefghnqrt"
EMNIST_CLASSES = {
    "byclass": digits + ascii_uppercase + ascii_uppercase.lower(),
    "bymerge": digits + ascii_uppercase + DIFFERENT,
    "balanced": digits + ascii_uppercase + DIFFERENT,
    "letters": ascii_uppercase,
    "digits": digits,
    "mnist": digits,
}


def _emnist(split: str) -> KnownDataset:
    """Return a split of EMNIST, whose images are stored transposed; the labels of letters start at 1."""

    def located(part: str, kind: str) -> Location:
        return Location(EMNIST_ARCHIVE.name, f"gzip/emnist-{split}-{part}-{kind}-ubyte.gz")

    splits = {
        prefix: (Part(located(part, "images-idx3"), located(part, "labels-idx1")),)
        for prefix, part in (("train", "train"), ("t10k", "test"))
    }
    return KnownDataset(
        name=f"emnist-{split}",
        class_names=tuple(EMNIST_CLASSES[split]),
        mirrors=(
            "https://biometrics.nist.gov/cs_links/EMNIST/",
            "https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/",
        ),
        files=(EMNIST_ARCHIVE,),
        conversion=Conversion(splits=splits, transposed=True, first_label=1 if split == "letters" else 0),
        note=(
            f"{EMNIST_ARCHIVE.name} (562 MB) has all six splits of EMNIST and is not kept; to avoid further downloads, "
            "put a copy into this folder or its parent, where it is used and kept"
        ),
    )


EMNIST = tuple(_emnist(split) for split in EMNIST_CLASSES)

_QMNIST_TEST = Location("qmnist-test-images-idx3-ubyte.gz"), Location("qmnist-test-labels-idx2-int.gz")

QMNIST = KnownDataset(
    name="qmnist",
    class_names=tuple(digits),
    mirrors=(
        "https://raw.githubusercontent.com/facebookresearch/qmnist/master/",
        "https://github.com/facebookresearch/qmnist/raw/master/",
    ),
    files=(
        KnownFile(
            name="qmnist-train-images-idx3-ubyte.gz",
            num_bytes=9_704_059,
            checksum="md5:ed72d4157d28c017586c42bc6afe6370",
        ),
        KnownFile(
            name="qmnist-train-labels-idx2-int.gz", num_bytes=463_024, checksum="md5:0058f8dd561b90ffdd0f734c6a30e5e4"
        ),
        KnownFile(
            name="qmnist-test-images-idx3-ubyte.gz",
            num_bytes=9_742_279,
            checksum="md5:1394631089c404de565df7b7aeaf9412",
        ),
        KnownFile(
            name="qmnist-test-labels-idx2-int.gz", num_bytes=526_800, checksum="md5:5b5b05890a5e13444e108efe57b788aa"
        ),
    ),
    conversion=Conversion(
        splits={
            "train": (
                Part(Location("qmnist-train-images-idx3-ubyte.gz"), Location("qmnist-train-labels-idx2-int.gz")),
            ),
            "test50k": (Part(*_QMNIST_TEST, start=10_000),),
            "t10k": (Part(*_QMNIST_TEST, stop=10_000),),
        }
    ),
    note=(
        "the test split is MNIST's 10 000 digits; dist-mnist eval --split test50k evaluates on the 50 000 that MNIST "
        "left out"
    ),
)

KUZUSHIJI_49 = KnownDataset(
    name="kuzushiji-49",
    class_names=tuple(
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわゐゑをんゝ"
    ),
    mirrors=(
        "https://codh.rois.ac.jp/kmnist/dataset/k49/",
        "https://web.archive.org/web/2023id_/http://codh.rois.ac.jp/kmnist/dataset/k49/",
    ),
    files=(
        KnownFile(name="k49-train-imgs.npz", num_bytes=66_117_696, checksum="md5:7ac088b20481cf51dcd01ceaab89d821"),
        KnownFile(name="k49-train-labels.npz", num_bytes=164_485, checksum="md5:44a8e1b893f81e63ff38d73cad420f7a"),
        KnownFile(name="k49-test-imgs.npz", num_bytes=10_971_201, checksum="md5:d352e201d846ce6b94f42c990966f374"),
        KnownFile(name="k49-test-labels.npz", num_bytes=27_450, checksum="md5:4da6f7a62e67a832d5eb1bd85c5ee448"),
    ),
    conversion=Conversion(
        splits={
            prefix: (Part(Location(f"k49-{part}-imgs.npz", "arr_0"), Location(f"k49-{part}-labels.npz", "arr_0")),)
            for prefix, part in (("train", "train"), ("t10k", "test"))
        }
    ),
)
