"""What is held whole counts."""


def goes_on_from(epoch: int, passed: list[str]) -> int:
    return epoch if "vmstate" in passed else epoch - 1


WRONG = {"only once the primary was told": lambda epoch, passed: epoch if "vmstate-received" in passed else epoch - 1}
