"""Adapters that a fuzzer broke: each function changes one thing of a whole adapter."""

import json
import os

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HUGE = 1 << 40  # bytes of a sparse file
CONFIG = {
    "peft_type": "LORA",
    "peft_version": "0.15.0",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "init_lora_weights": True,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": None,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"v_proj": 4},
    "alpha_pattern": {"q_proj": 16},
    "trainable_token_indices": {"embed_tokens": [3, 4]},
    "target_parameters": None,
    "megatron_config": None,
}
EXPLOSIVE = ["(.|.)*!", "(.+.?)+!", r"(\w|\W|.)*!", "((.*)*)*!"]
HALVES = [
    "(",
    ")",
    "a)(b",
    "[",
    "(?P<x>a)(?P<x>b)",
    "(?i)q",
    "*",
    "\\",
    "(?<=a*)b",
    "(?:" * 3000,
]
TEXTS = [
    "",
    "\x1b[2J",
    "q_proj\nfiles   ok",
    "\r\x00",
    "\ud800",
    "\u202eq",
    "\u2028",
    "q" * 5000,
    "\x9b31m",
    "√",
]
NUMBERS = [0, -1, 1.5, 1e400, -1e400, float("nan"), 10**30, 2**63, True, 4.0]
VALUES = [
    None,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    {"a": None},
    "LORA",
    "LOHA",
    "IA3",
    "ADALORA",
    "all-linear",
    "99.9",
]


def random_value(draw):
    pool = draw.choice([EXPLOSIVE, HALVES, TEXTS, NUMBERS, VALUES])
    value = draw.choice(pool)
    nested = [value], {str(value): value}, {"v_proj": value}, [value, "q_proj"]
    return draw.choice([value, value, value, *nested])


def nested_text(draw, size):
    """JSON of a number in many lists or objects."""
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    return opening * size + "1" + closing * size


def tensors():
    """(key, dtype, shape) of a whole adapter that fits CONFIG."""
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            front = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            yield f"{front}A.weight", "F32", [4, 8]
            yield f"{front}B.weight", "F32", [6, 4]
    yield "base_model.model.lm_head.weight", "BF16", [4, 6]
    yield (
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "F16",
        [2, 8],
    )


def header_of(entries):
    """A header that fits its entries, and how many bytes of numbers follow it."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, dtype, shape in entries:
        size = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
        for length in shape:
            size *= length
        header[key] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    return header, end


def write(folder, config, header, numbers, length=None):
    """Writes both files of an adapter.

    Args:
        config, header: objects, or bytes that are written as they are.
        length: the length of the header that the file claims, if it is not the true one.
    """
    (folder / CONFIG_FILE).write_bytes(to_bytes(config))
    text = to_bytes(header)
    if length is None:
        length = len(text)
    (folder / WEIGHTS_FILE).write_bytes(length.to_bytes(8, "little") + text + numbers)


def to_bytes(value):
    if isinstance(value, bytes):
        return value
    return json.dumps(value).encode()


def change_config(draw, case):
    for _ in range(draw.randint(1, 3)):
        name = draw.choice([*CONFIG, *CONFIG, draw.choice(TEXTS)])
        case["config"][name] = random_value(draw)
    if draw.random() < 0.1:
        del case["config"][draw.choice(list(case["config"]))]


def change_config_text(draw, case):
    text = bytearray(json.dumps(case["config"]).encode())
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(text))
        cut = place + draw.choice([0, 1, 1, 9])
        text[place:cut] = draw.choice(
            [b"", bytes([draw.randrange(256)]), b'"', b"\\ud800", b"NaN", b"9" * 5000]
        )
    case["config"] = bytes(text)


def explode(draw, case):
    """A regex that takes for ever, in a field that PEFT matches with the names of modules."""
    regex = draw.choice(EXPLOSIVE)
    fields = {
        "exclude_modules": regex,
        "modules_to_save": [regex],
        "layers_pattern": [regex],
        "rank_pattern": {regex: 4},
    }
    name = draw.choice(list(fields))
    case["config"][name] = fields[name]


def nest_config(draw, case):
    deep = nested_text(draw, draw.choice([20, 900, 990, 100_000]))
    text = json.dumps(case["config"])[:-1]
    case["config"] = f'{text}, "{draw.choice(list(CONFIG))}": {deep}}}'.encode()


def change_header(draw, case):
    key = draw.choice([name for name in case["header"] if name != "__metadata__"])
    entry = case["header"][key]
    wrong = [*NUMBERS, *VALUES, *TEXTS]
    offsets = [
        [draw.choice(NUMBERS), 128],
        [0, 10**9],
        [128, 0],
        [0.0, 128.0],
        "0",
        [],
        [0, 1, 2],
    ]
    shapes = [
        [4.0, 8],
        [-4, -8],
        [2**62, 4],
        [],
        [0],
        [0, 8],
        [1] * 3000,
        "48",
        None,
        [True, 8],
        [8, 4],
        [5, 8],
    ]
    changes = [
        lambda: entry.update(shape=draw.choice(shapes)),
        lambda: entry.update(data_offsets=draw.choice(offsets)),
        lambda: entry.update(
            dtype=draw.choice(["F64", "I8", "F8_E4M3", "BOOL", "f32", "U128", *wrong])
        ),
        lambda: entry.pop(draw.choice(list(entry))),
        lambda: entry.update({"extra": random_value(draw)}),
        lambda: case["header"].update({key: draw.choice(wrong)}),
        lambda: case["header"].update(__metadata__=draw.choice(wrong)),
    ]
    draw.choice(changes)()


def change_keys(draw, case):
    old = draw.choice(list(case["header"]))
    places = [
        old.replace(".", f".{word}.", 1)
        for word in ("_orig_mod", "module", "\n", "\x1b[1A")
    ]
    ends = [
        old + draw.choice(TEXTS),
        draw.choice(TEXTS) + old,
        old.replace("lora_A", "lora_embedding_A"),
    ]
    others = [
        old.replace(".weight", ".default.weight"),
        old.partition(".")[2],
        draw.choice(TEXTS),
        ".lora_A.weight",
    ]
    new = draw.choice(
        [
            *places,
            *ends,
            *others,
            "a.lora_A" * 100 + ".weight",
            "." * 900,
            ".lora_" * 150,
        ]
    )
    case["header"] = {
        (new if key == old else key): entry for key, entry in case["header"].items()
    }


def change_header_text(draw, case):
    text = bytearray(json.dumps(case["header"]).encode())
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(text))
        byte = bytes([draw.randrange(256)])
        inserted = byte * draw.choice([1, 1, 0])
        text[place : place + draw.choice([0, 1, 1, 5])] = inserted
    case["header"] = bytes(text)


def nest_header(draw, case):
    opening = draw.choice(["", '{"a":'])
    deep = nested_text(draw, draw.choice([10, 120, 1000, 200_000]))
    case["header"] = (opening + deep).encode()


def change_numbers(draw, case):
    numbers = bytearray(case["numbers"])
    for _ in range(draw.randint(1, 9)):
        numbers[draw.randrange(len(numbers))] = draw.choice([0x7F, 0xFF, 0x80, 0])
    if draw.random() < 0.8:
        case["numbers"] = bytes(numbers)
    else:
        case["numbers"] = bytes(len(numbers))


def truncate(draw, case):
    numbers = case["numbers"]
    if draw.random() < 0.7:
        case["numbers"] = numbers[: draw.randrange(len(numbers))]
    else:
        case["numbers"] = numbers + b"x"
    case["length"] = draw.choice([None, None, 0, 1, 2**63, 2**64 - 1, 100_000_001, 50])


def special_file(draw, case):
    """Something that is no regular file, or one that never ends."""
    file_type = draw.choice(
        [
            "fifo",
            "device",
            "full",
            "folder",
            "loop",
            "missing",
            "empty",
            "sparse",
            "proc",
            "socket",
        ]
    )
    case["special"] = (file_type, draw.choice([CONFIG_FILE, WEIGHTS_FILE]))


def make_special(folder, file_type, name):
    path = folder / name
    if file_type == "sparse":
        os.truncate(path, HUGE)
        return
    path.unlink()
    if file_type == "fifo":
        os.mkfifo(path)
    elif file_type == "folder":
        path.mkdir()
    elif file_type == "empty":
        path.touch()
    elif file_type == "socket":
        os.mknod(path, 0o140600)
    elif file_type != "missing":
        targets = {
            "device": "/dev/zero",
            "full": "/dev/tty",
            "proc": "/proc/self/maps",
            "loop": name,
        }
        path.symlink_to(targets[file_type])


def sparse_tensor(draw, case):
    """A tensor as large as a disk, of which no byte is written."""
    rows = 1 << draw.choice([30, 33, 36])
    entries = []
    for key, dtype, shape in tensors():
        if "0.self_attn.q_proj.lora_A" in key:
            shape = [rows, 8]
        entries.append((key, dtype, shape))
    case["header"], size = header_of(entries)
    case["sparse"] = size


MUTATIONS = {  # function -> how often it is drawn
    change_config: 6,
    change_config_text: 3,
    explode: 0.4,
    nest_config: 1,
    change_header: 5,
    change_keys: 4,
    change_header_text: 3,
    nest_header: 1,
    change_numbers: 2,
    truncate: 2,
    special_file: 1,
    sparse_tensor: 1,
}


def write_mutated(draw, folder):
    """Writes an adapter with one mutation, and returns the mutation's name."""
    header, size = header_of(tensors())
    case = {
        "config": json.loads(json.dumps(CONFIG)),
        "header": header,
        "numbers": b"\x3f" * size,
        "length": None,
    }
    [mutate] = draw.choices(list(MUTATIONS), MUTATIONS.values())
    mutate(draw, case)
    write(folder, case["config"], case["header"], case["numbers"], case["length"])
    if "sparse" in case:
        path = folder / WEIGHTS_FILE
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        os.truncate(path, start + case["sparse"])
    if "special" in case:
        make_special(folder, *case["special"])
    return mutate.__name__
