"""Generated handwritten-like digits in MNIST's format, for where no network reaches a mirror.

A digit is one of several skeletons of its class, bent, slanted and shaken at random, traced by a pen of random width,
then scaled and centred as in MNIST. The skeletons were written by hand, none traced from an image; which ones, and the
ranges of slant, proportions and pen width, were chosen by how MNIST's training set looks and is read.

Measured: a CNN (conv 5x5x32, pool, conv 5x5x64, pool, dense 1024, dropout 0.4) trained on 60 000 of these (seed 0,
3 epochs, batch 256, Nesterov SGD, one cycle to 0.1, bf16, no augmentation; a single run) reads 97.2 % of MNIST's 10 000
test images, which were not looked at while the skeletons were chosen.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_mnist.data.idx import write_idx_chunks
from dist_mnist.errors import UserError

SPLITS = {"train": 0, "test": 1}
BLOCK = 512  # samples drawn from one key; changing it changes every sample
LANES = 64  # samples rasterised together, few enough that their distance field stays in the processor's cache
SIDE = 28
INK_BOX = 19.6  # pixels of a digit's longer side; with the pen's soft edge, MNIST's 20
PEN_HALF_WIDTH = 1.28  # pixels, the median
NUM_POINTS = 72  # pen positions along a digit: at most about a pixel apart
STEPS = 65  # finer positions on each curve piece, from which those are chosen

# Skeletons, written `how often* points; ...`. A point xxyy counts from the top left in hundredths of the digit's box;
# `!` makes it a sharp corner, `|` lifts the pen.
GLYPHS = {
    0: """
        4* 5902 3204 1024 0554 1888 4899 7788 9554 8620 6101 4305; 2* 6100 4308 3034 2762 3692 5299 6688 7558 7324
        6403 5202; 1* 3912 1628 0556 1890 5099 8288 9552 8418 5702 3906 4120; 1* 8216 5002 1816 0554 2190 5099 7988
        9550 8418 6408 4820; 0.6* 3206 1226 0556 1890 5099 7990 9556 8622 6404; 0.6* 7710 9334 9170 6698 3298 0770
        0932 3406 6402 8414; 0.4* 8802 6106 2714 0750 2190 5099 8286 9352 7922 5508 3412; 0.5* 6830 4336 1622 3902
        6800 9124 9558 7390 4399 1484 0352 1620 4302; 0.4* 7106 4007 1037 1276 4596 8385 9952 8522 6017 5026 6335;
        0.4* 3002 2620 1250 2488 5699 8682 9250 7622 5014 3030""",
    1: """
        8* 5000 5035 5068 5099; 1.5* 4600 5234 5366 4899; 1* 5600 5034 4866 5299; 1.2* 3618 5400! 5250 5099; 0.6*
        2626 5400! 5350 5299; 0.9* 2822 5200! 5250 5098! | 2299 5098 8097; 0.2* 5000 5050 5098! | 2698 7698; 0.6*
        2034 3616 5400! 5050 4499; 0.3* 2810 4804 6600! 5050 3499! | 0898 3699 6097""",
    2: """
        3* 1129 2609 5201 7517 7940 6164 3183 0096! 4594 9996; 2* 1528 3108 5803 7922 7845 5773 2392 0291 1079 3279
        5591 8097 9989; 1.2* 0915 4607 8310! 5055 0296! 5095 9995; 1.4* 1325 3800 7011 7640 4872 0497! 2890 6295
        9986; 1.2* 2843 1631 2809 5404 7620 7645 5270 0994! 5088 9994; 1* 1034 3506 6508 7534 6065 3988 1397 0086
        1975 4881 9891; 0.8* 2618 4600 6416 6745 5574 3098! 5795 9197; 0.8* 0928 3316 6012 7825 6549 3471 1385 3591
        6689 9985; 1.5* 1546 1525 3607 6412 7335 6262 3485 0891 0579 2271 4277 6389 9984; 1.2* 2741 2718 4806 7318
        7843 6169 3188 0885 1669 3969 6180 9983; 1* 2230 3609 5916 6341 4664 1085! 4078 6683 9987; 0.8* 3945 1840
        2411 5400 7721 7451 4879 1398 0086 2074 4586 7798 9988; 0.7* 3018 5000 7214 7136 5059 3177 3597 1698 1484
        4183 6491 9193; 0.6* 0538 2720 5516 6830 5054 1582 0591! 3986 9979; 0.9* 2336 2611 5200 7323 6657 3883 1191
        0877 3272 6284 9197; 0.7* 0538 2011 4800 7616 8745 6675 2693! 5793 9197; 0.6* 2925 4809 7018 6945 4374 3390
        6097 9799; 1.2* 1830 2808 5600 8018 7844 5874 3092 0886 2466 5268 7888 9899; 1.2* 1036 1612 4800 8010 8636
        6466 3684 1690 1078 3068 5876 7492 8099; 0.8* 3212 5000 7008 7230 5856 4080 2484 2470 4268 5680 7099; 0.8*
        0620 3000 6204 7424 5452 2676 1092 2484 5090 9698; 1.4* 2238 2610 5000 7212 7440 6072 3494 1086 1262 3654
        6076 8096 9999; 1.2* 1830 3006 6000 8020 7850 6080 3697 1092 0470 2256 4862 6880 8899; 1* 3030 4008 6800 8022
        7848 6486 4098 2090 2270 4664 6480 7899; 0.6* 3026 3808 5600 7014 5834 3646 5852 6264 4082 2096 2084 4484
        6894 9096""",
    3: """
        3* 1412 4000 7006 7626 5843 3847! 6650 8470 7292 4299 1090; 1.2* 1205 4403 7604! 5826 4243! 7048 8470 7093
        4099 1090; 1.5* 1614 4200 7008 7228 5244 3650 5250 7456 8476 6696 3899 1288; 1* 2010 4800 7412 7034 4646 6654
        8274 6496 3499 1092; 0.8* 1022 2802 6202 7424 5642 3446! 6048 8062 8284 5699 2697 1080; 0.8* 2608 5400 7814
        7036 4450 3046 4442 6654 7476 5696 2899 0490; 0.8* 0414 3002 6004 6620 4638 2646! 6244 9260 8486 4899 0896;
        0.7* 2416 5000 7210 6628 5042! 6252 7070 6090 3699 1494; 0.7* 1626 2206 5200 8012 7036 4046 3442 5846 8462
        8288 5099 2096 1478; 0.6* 1008 4010 7002! 5624 4040! 6042 7658 7080 4696 2099; 0.6* 3010 5400 7212 5834 4444
        6454 6672 4888 0499; 0.8* 1208 4000 6606 6226 4042! 6252 6870 6086 4099; 0.8* 0014 3004 6200 7016 5632 3644!
        6046 7858 7482 5299; 0.7* 2210 5000 6814 5436 3050! 6050 8860 8880 5696 1099""",
    4: """
        2.5* 2004 1428 0852! 4650 8846 | 8200 7030 6464 6499; 1.5* 1404 1030 2250 5050 7638 | 8600 7432 6866 6699;
        1.2* 6000 3432 0664! 4864 9462 | 7204 6436 6268 6699; 1.6* 1802 1028 1248 3854 6646 7824 8602! 7636 7268
        7299; 1* 5602 3428 1058! 5058 9256 | 7422 6848 6276 6499; 1* 2802 1626 0650! 4052 9454 | 6812 5840 5470 5699;
        0.8* 2010 1234 2450 5246 7220! 8402! 7236 6668 6699; 0.6* 1098 4050 7202! 6430 6260! | 2662 0860 2460 6058
        9058; 0.9* 1006 1028 1050! 4650 8450 | 8602 8036 8070 8699; 0.6* 7604 4216 1448! 4452 7244 | 8004 7036 6668
        6899; 0.6* 4400 2632 0470! 4468 9664 | 5834 5660 5480 5899; 0.25* 6800 3624 1648 3656 6240 8410! 7440 6672
        6499; 0.25* 8602 4016 1440 3450 6632 8806! 6836 5670 5099; 0.6* 3400 2826 2050! 4852 7844 | 6624 6050 5476
        5699; 0.8* 0802 0626 1846 4646 7020! 9004! 7236 6266 5699""",
    5: """
        2.5* 9602 5404 2706! 1842! 4838 7548 8470 6794 3599 0588; 2* 2808 2325 1944! 4840 7752 7977 5496 2697 0787 |
        2808 5606 9904; 1.4* 9804 5402 2912 2732 5046 7360 7882 5498 2799 0588; 1.2* 9914 7416 4320! 3443! 5250 6165
        4881 3089 1086; 1* 8800 5204 3108! 2740! 5448 6766 6388 3799 1292; 0.8* 2910 2026 1842 3940 6744 8264 7390
        4499 1294 | 2508 5608 9402; 0.7* 8104 3302! 2722 2544! 5036 7842 8666 7192 4299 1892 1278; 0.8* 9602 5602
        3306! 2540! 5636 8054 7884 4899 2090 2270 3966; 0.8* 9916 7316 3719! 2548! 4545 5957 5277 3189 0884; 0.8*
        3914 3332 2948! 5648 7164 6586 3999 1492 | 3912 6310 9600; 0.7* 6502 3910 3128 4846 6364 6188 3999 2588; 0.7*
        1212 1530 1948! 4637 7745 8566 6590 3195 1286 | 1412 5010 9910; 0.8* 3925 3650! 5950 7065 5984 2789 | 3924
        7217 9911; 0.8* 9000 6010 4016! 3046! 5644 6662 5684 3099 1094; 0.7* 7600 4604 2610! 2234! 5030 9044 9670
        7092 2099; 0.7* 6000 3004! 2644! 4438 6448 7070 6090 3099""",
    6: """
        3* 6600 4216 2244 1272 2696 5499 7684 7264 4856 2470 1686; 1.6* 7802 5222 2848 1474 2696 5698 7882 7064 4664
        2482; 1.2* 7612 5800 3414 1644 1274 2898 5898 7878 6658 3856 1672; 1.2* 4000 2828 2058 2488 4899 7490 7868
        5854 3462 2282; 1* 6000 3620 1850 1480 3499 6494 7272 5458 3472 3692; 0.8* 7204 4420 2250 1680 3498 5692 6476
        5268 3474 2090; 0.8* 5600 3622 1852 1282 3299 6698 9080 8060 5462 2484; 1* 3600 2230 1662 2692 5699 8286 8464
        6252 3660 2080; 1* 4006 1634 1070 3098 6696 9274 8252 5654 3676; 0.8* 6002 3026 1262 2496 6096 9472 8450 5458
        4680 6292; 0.6* 6400 5230 4058 3484 4699 6088 6272 5066 3880; 0.8* 7000 4814 2840 2070 3492 6098 7482 6072
        4080 3490""",
    7: """
        3* 1008 4607 8405! 7036 5666 4499; 1.4* 1022 1307! 4606 8404! 6836 5666 4699; 1.2* 0816 2405 4810 8204! 6636
        5466 4699; 1.4* 1008 4607 8205! 6640 5468 4299 | 3254 5650 8047; 1.2* 1018 3404 6604 7820 6648 5474 4699;
        0.8* 2212 4404 7004! 6836 6466 6099; 0.7* 1426 2606 4802 6614! 6440 5870 5499; 0.6* 0414 4808 9604! 6434 3666
        1899; 0.4* 1634 1808! 4810 7806! 7640 7070 6699; 0.8* 1034 1208! 4608 8406! 7640 6670 5899; 0.8* 0430 2010
        3816 6020 9004! 7036 5268 4099; 0.7* 1424 2404 4408 6212 8406! 7032 5856 4898 | 3658 6054 9054; 0.6* 2040
        1814 4004 6802 7618 6252 5080 4499; 0.6* 0810 4608 8404! 7236 6666 6499 | 4452 6848 9646; 0.7* 1610 4408
        7404! 6036 5266 4699 | 1456 4852 8648; 0.6* 0832 1808! 5012 9002! 5848 4276 3299; 0.7* 0842 1612! 5010 8602!
        7632 6464 5899; 0.5* 2428 3006 5000 7210 7040 6270 5699""",
    8: """
        3* 8212 5200 2612 3034 5450 7670 6894 4299 2086 3064 5448 7828 8212; 1.2* 5047 2634 2610 5000 7810 7434 5047
        2266 2290 5099 7890 7866 5047; 1.2* 9214 6000 3010 3032 5248 7068 6292 3899 1886 2864 5444 8822; 1* 7230 8808
        5602 2814 3436 5652 7274 5896 3498 2080 3860 6640 8022; 1* 6608 4202 2818 4038 5854 6478 5098 3292 3072 4852
        6432 6608; 0.8* 5044 8026 7604 4402 2620 4442 7058 8080 6098 3098 1878 3256 5244; 0.6* 9604 6610 3612 2628
        4844 6262 5888 3499 1886 3264 6044 8818 8206; 1* 8808 5600 2810 2828 4842 6658 6084 4699 3688 4464 5644 8610;
        0.9* 8404 5008 2222 3042 5854 8272 7094 3899 1888 3666 6042 8220 7806; 0.8* 6034 3836 2620 4002 6400 8016
        6434 4052 2276 3498 6498 7680 6460 4444 3434; 0.8* 7822 5402 3008 3226 5642 8660 8686 5299 1690 1666 4648
        7036 7818; 0.7* 5840 3232 2412 4600 7808 8026 5446 4466 4290 5499 6688 6266 5044; 0.6* 8004 4400 1816 2640
        5650 7666 6690 3696 2680 4460 7040 9610; 1* 8804 5044 2480 4099 6486 5052 2422 4002 6806; 0.9* 6212 3804 2420
        4442 5462 5286 4299 3484 4856 6830 9004; 0.8* 7618 4602 2416 4040 6262 6092 3899 2284 4454 7430 9812; 0.9*
        5046 1436 1608 5000 8410 8434 5046 1062 1492 5099 9090 8862 5046; 0.7* 8010 5002 2004 3426 5446 7072 6296
        4098 3078 4654 6632 8208; 0.7* 7004 4006 3624 5040 6256 5484 3699 2288 3466 5646 7626 7204; 0.8* 6042 2640
        1022 3004 6000 8812 8632 6046 2856 0878 2498 6099 9288 9066 6248""",
    9: """
        3* 7614 5200 2812 1836 3650 6042 7616! 7444 6872 6099; 1.4* 7412 4600 2216 2242 4850 7234 7612! 7848 7280
        5099 2294; 1.2* 7010 4402 2220 2642 5046 7228 7408! 6440 5270 4099; 1.2* 6436 3646 2228 3606 6202 7618 7446
        6874 6299; 1* 7222 7004 4402 2420 2844 5444 7222 7446 7274 7099; 0.8* 8406 5204 2420 2240 4646 7224 8006!
        7040 6070 5299; 0.7* 7836 5450 2840 2216 4600 7210 8040 7672 5698 3098 1684; 0.7* 3010 1634 3248 6040 7412!
        5802 3408 | 7412 7044 6472 5899; 0.9* 7006 4010 1432 2446 5236 7210! 6840 6070 5499; 0.9* 8020 6602 3604 1628
        2850 5844 8022! 8450 7878 7099; 0.7* 7430 5606 3208 2234 4048 6636 7428! 6656 4884 1699; 0.7* 6818 5200 3414
        3640 5644 7024 6804! 6640 6270 5699; 0.6* 8800 5206 2022 2242 5240 7618! 6446 4674 3099; 0.9* 7608 4002 1030
        2256 5044 7612! 7240 7070 7498; 0.9* 7212 4400 2020 3044 5642 7414 8044 7474 5099; 0.7* 6030 3444 1834 4008
        6804! 6432 5866 5499; 0.6* 6610 4000 1814 2034 4240 6614! 7244 7672 7899; 0.9* 7820 5600 2210 1040 3066 6258
        8024! 8050 7876 7699; 0.6* 7218 5000 2610 2232 4442 7022! 7650 7084 4699 2490 4072 6666; 0.7* 8414 4006 0822
        1438 4434 7816! 7246 6674 6299; 0.7* 8002 5008 1626 2044 5040 8414! 6646 4674 2699""",
}


class Skeletons(NamedTuple):
    """All skeletons, stacked along the first axis; those with fewer than K control points are padded with zeros."""

    digits: np.ndarray  # uint8
    odds: np.ndarray  # probability of each; every digit's add up to a tenth
    control: np.ndarray  # (K, 2) control points, the box's centre at 0
    straight: np.ndarray  # (NUM_POINTS, K) weights of the control points in each pen position, for straight pieces
    curved: np.ndarray  # (NUM_POINTS, K) what to add to them for round pieces
    joined: np.ndarray  # (NUM_POINTS,) 1 where ink leads from the position before to this one


def make_digits(count: int, seed: int, split: str = "train", start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples `start` to `start + count` of the endless sequence of (seed, split): images and labels.

    Returns uint8 images (count, 28, 28) and uint8 labels (count,). A sample is the same however it is asked for. On
    other processors or numpy versions rounding may change single pixels: ranks that must agree share files instead.

    Raises:
        UserError: a negative number, or a split other than train and test.
    """
    _check(split, count=count, seed=seed, start=start)
    images, labels = np.empty((count, SIDE, SIDE), np.uint8), np.empty(count, np.uint8)
    for block in range(start // BLOCK, -(-(start + count) // BLOCK) if count else 0):
        first = block * BLOCK
        begin, end = max(start, first), min(start + count, first + BLOCK)
        block_images, block_labels = _draw_block(seed, split, block)
        images[begin - start : end - start] = block_images[begin - first : end - first]
        labels[begin - start : end - start] = block_labels[begin - first : end - first]
    return images, labels


def write_digits(folder: Path, seed: int = 0, num_train: int = 60_000, num_test: int = 10_000) -> None:
    """Write MNIST's four files, raw, into `folder` (created); the test labels come last and mark a complete folder.

    Raises:
        UserError: a negative number.
        OSError: the folder cannot be written.
    """
    _check("train", seed=seed, num_train=num_train, num_test=num_test)
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix, count in (("train", "train", num_train), ("test", "t10k", num_test)):
        labels = np.empty(count, np.uint8)  # a byte each: kept while the images stream by
        chunks = _image_chunks(seed, split, labels)
        write_idx_chunks(folder / f"{prefix}-images-idx3-ubyte", np.uint8, (count, SIDE, SIDE), chunks)
        write_idx_chunks(folder / f"{prefix}-labels-idx1-ubyte", np.uint8, (count,), [labels])


def _image_chunks(seed: int, split: str, labels: np.ndarray) -> Iterator[np.ndarray]:
    """Images a block at a time, filling `labels` on the way."""
    for start in range(0, len(labels), BLOCK):
        count = min(BLOCK, len(labels) - start)
        images, labels[start : start + count] = make_digits(count, seed, split, start)
        yield images


def _check(split: str, **numbers: int) -> None:
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    for name, number in numbers.items():
        if number < 0:
            raise UserError(f"{name} is {number}; expected 0 or more")


def _draw_block(seed: int, split: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """All samples of one block: uint8 images (BLOCK, 28, 28), uint8 labels (BLOCK,)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS[split], block])))
    skeletons = _skeletons()
    chosen = rng.choice(len(skeletons.odds), BLOCK, p=skeletons.odds)
    points = _distort(rng, _trace(rng, skeletons, chosen))
    half_width = np.clip(PEN_HALF_WIDTH * np.exp(_normal(rng, 0.27)), 0.6, 3)
    points = _normalise(points, skeletons.joined[chosen], half_width) + _normal(rng, 0.35, 1, 2)
    return _rasterise(rng, points, half_width), skeletons.digits[chosen]


def _normal(rng: np.random.Generator, scale: float, *shape: int) -> np.ndarray:
    """Normal draws (BLOCK, *shape), float32."""
    return rng.standard_normal((BLOCK, *shape), dtype=np.float32) * np.float32(scale)


def _trace(rng: np.random.Generator, skeletons: Skeletons, chosen: np.ndarray) -> np.ndarray:
    """Pen positions (BLOCK, NUM_POINTS, 2) along the chosen skeletons: points shaken, curves more or less round."""
    control = skeletons.control[chosen]
    control = control + 0.025 * np.exp(_normal(rng, 0.4, 1, 1)) * _normal(rng, 1, *control.shape[1:])
    roundness = rng.uniform(0.65, 1.25, (BLOCK, 1, 1)).astype(np.float32)
    return (skeletons.straight[chosen] + roundness * skeletons.curved[chosen]) @ control


def _distort(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Bend whole digits smoothly: what differs from one writer, and one day, to the next."""
    # The hand drifts slowly along the stroke.
    along = np.linspace(0, 1, NUM_POINTS, dtype=np.float32)[None, :, None]
    turns = _normal(rng, 1.2, 1, 2) * along + _normal(rng, 1, 1, 2)
    x, y = np.moveaxis(points + _normal(rng, 0.045, 1, 2) * np.sin(2 * np.pi * turns), -1, 0)
    # Top and bottom, left and right differ in size, and lines bend.
    x, y = (
        x * (1 + _normal(rng, 0.22, 1) * y + _normal(rng, 0.2, 1) * x) + _normal(rng, 0.2, 1) * (y * y - 0.1),
        y * (1 + _normal(rng, 0.15, 1) * x) + _normal(rng, 0.25, 1) * (0.25 - y * y) + _normal(rng, 0.15, 1) * x * x,
    )
    # The paper has small waves.
    phase = 2 * np.pi * rng.random((BLOCK, 2, 1), dtype=np.float32)
    wave = _normal(rng, 0.02, 2, 1)
    x, y = x + wave[:, 0] * np.sin(7 * y + phase[:, 0]), y + wave[:, 1] * np.sin(7 * x + phase[:, 1])
    # Width, slant, rotation.
    x = x * np.exp(_normal(rng, 0.2, 1) - 0.08)
    x = x - y * (0.09 + _normal(rng, 0.25, 1))
    angle = _normal(rng, 0.1, 1)
    return np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=-1)


def _normalise(points: np.ndarray, joined: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """Scale the longer side, pen included, to INK_BOX pixels and put the centre of ink at the image's centre."""
    points = points * ((INK_BOX - 2 * half_width) / np.ptp(points, axis=1).max(axis=1))[:, None, None]
    ink = np.linalg.norm(np.diff(points, axis=1, prepend=points[:, :1]), axis=-1, keepdims=True) * joined[..., None]
    return points - (points * ink).sum(axis=1, keepdims=True) / ink.sum(axis=1, keepdims=True) + SIDE / 2


def _rasterise(rng: np.random.Generator, points: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """Images (BLOCK, 28, 28), uint8, of pens of `half_width` pixels, pressed unevenly, that went through `points`."""
    along = np.linspace(-1, 1, NUM_POINTS, dtype=np.float32)
    pressure = 1 + _normal(rng, 0.12, 1) * along + _normal(rng, 0.07, 1) * np.cos(4.5 * (along + 1))
    pressure = np.maximum(pressure, 0.5)
    blur = rng.uniform(0.9, 1.4, (BLOCK, 1, 1)).astype(np.float32)
    rough = rng.random((BLOCK, SIDE, SIDE), dtype=np.float32) * 0.25 - 0.125
    images = np.empty((BLOCK, SIDE, SIDE), np.uint8)
    for lanes in (slice(i, i + LANES) for i in range(0, BLOCK, LANES)):
        distance = _distance(points[lanes], pressure[lanes]) + rough[lanes]
        ink = (half_width[lanes, None, None] - distance) / blur[lanes] + 0.5
        images[lanes] = np.clip(ink, 0, 1) * 255
    return images


def _distance(points: np.ndarray, pressure: np.ndarray) -> np.ndarray:
    """Distance (LANES, 28, 28) of each pixel's centre to the nearest point; points of more pressure count as nearer."""
    # Samples lie innermost, so that the loop's two operations run over contiguous memory.
    centres = np.arange(0.5, SIDE, dtype=np.float32)[:, None]
    offsets = (centres - points.transpose(2, 1, 0)[:, :, None]) / pressure.T[:, None]
    across, down = np.square(offsets)  # each (NUM_POINTS, 28, LANES)
    nearest = np.full((SIDE, SIDE, len(points)), np.inf, np.float32)
    square = np.empty_like(nearest)
    for x, y in zip(across, down, strict=True):
        np.add(y[:, None], x[None], out=square)
        np.minimum(nearest, square, out=nearest)
    return np.sqrt(nearest).transpose(2, 0, 1)


@cache
def _skeletons() -> Skeletons:
    """The parsed GLYPHS."""
    entries = [(digit, *glyph.split("*")) for digit, glyphs in GLYPHS.items() for glyph in glyphs.split(";")]
    digits = np.array([digit for digit, *_ in entries], np.uint8)
    weights = np.array([float(weight) for _, weight, _ in entries])
    odds = weights / np.bincount(digits, weights)[digits] / len(GLYPHS)
    tables = [_skeleton(path) for *_, path in entries]
    size = max(len(control) for control, *_ in tables)
    control = np.stack([_padded(control.T, size).T for control, *_ in tables])
    straight, curved = (np.stack([_padded(table[k], size) for table in tables]) for k in (1, 2))
    return Skeletons(digits, odds, control, straight, curved, np.stack([table[3] for table in tables]))


def _padded(table: np.ndarray, size: int) -> np.ndarray:
    return np.pad(table, ((0, 0), (0, size - table.shape[1]))).astype(np.float32)


def _skeleton(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Control, straight, curved and joined of one skeleton: cubic Hermite pieces with no tangent at corners."""
    words = [(stroke, word) for stroke, part in enumerate(path.split("|")) for word in part.split()]
    control = np.array([(int(word[:2]), int(word[2:4])) for _, word in words], np.float32) / 100 - 0.5
    strokes = np.array([stroke for stroke, _ in words])
    here, eye = np.arange(len(words)), np.eye(len(words))
    after = here + (np.append(strokes[1:], -1) == strokes)
    before = here - (np.insert(strokes[:-1], 0, -1) == strokes)
    corner = np.array([word.endswith("!") for _, word in words])[:, None]
    tangent = np.where(corner, 0, (eye[after] - eye[before]) / 2)
    piece = np.repeat(here[after > here], STEPS)  # the piece from point i to i + 1, at each of its fine steps
    t = np.tile(np.linspace(0, 1, STEPS), len(piece) // STEPS)[:, None]
    rise = t * t * (3 - 2 * t)
    straight = (1 - rise) * eye[piece] + rise * eye[piece + 1]
    curved = t * (1 - t) ** 2 * tangent[piece] - t * t * (1 - t) * tangent[piece + 1]
    chosen = _evenly((straight + curved) @ control, strokes[piece])
    joined = np.diff(strokes[piece][chosen], prepend=0) == 0
    return control, straight[chosen], curved[chosen], joined.astype(np.float32)


def _evenly(path: np.ndarray, strokes: np.ndarray) -> np.ndarray:
    """NUM_POINTS indices into `path`, at even distances along its inked parts."""
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1) * (np.diff(strokes) == 0)
    along = np.append(0, np.cumsum(steps))
    return np.searchsorted(along, np.linspace(0, along[-1], NUM_POINTS))
