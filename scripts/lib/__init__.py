"""The library the scripts are made of: small modules, one subject each, no Snakemake, no global state."""
