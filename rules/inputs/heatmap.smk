# Input functions of rules/heatmap.smk.


def heatmap_gpus(wildcards, input):
    cards = heatmap_estimate.train_needs(spec(wildcards.model)).gpu
    return ",".join(f"{size:g}" for size in PROJECT.hardware.gpus[:cards])


def clips_folder(wildcards, input):
    """Where the clips are; no recorded parameter, since their identity tells when they are others."""
    return spec(wildcards.model).clips.path or f"work/{wildcards.model}/clips"


def clip_tables(wildcards):
    """What says which clips there are: the tables of those that are there already, or the mark that they were drawn."""
    path, drawn = spec(wildcards.model).clips.path, f"work/{wildcards.model}/clips"
    return sorted(map(str, Path(path).glob(LABELS))) if path else [drawn, f"{drawn}.made"]


def frames_seen(model):
    """Names, sizes and times of the frames that are there already, as one digest, so that a change of one is seen."""
    path = spec(model).clips.path
    if not path:
        return ""
    folders = sorted({table.parent for table in Path(path).glob(LABELS)})
    found = [(entry.path, entry.stat()) for folder in folders for entry in os.scandir(folder)]
    return digest_json(sorted([os.path.relpath(file, path), at.st_size, at.st_mtime_ns] for file, at in found))
