# Takes any file in our folders that no other rule makes, and says why it cannot be made.


rule wrong_target:
    """Explain a target that cannot be made."""
    input:
        explain_wrong_target,
    output:
        "{wrong}",
    wildcard_constraints:
        # In our folders other rules may write as well, where this is a module.
        wrong="(?!)" if IN_MODULE else wrong_targets(PROJECT),
    localrule: True
