def is_consolidated(folder):
    return False


def plan(config, family): ...
