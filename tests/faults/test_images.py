from tests.faults import images


def test_hand_made_and_mutated_files_become_right_images_or_one_line():
    figures = images.decode(mutated=800)
    assert figures["files"] == 25
    assert min(figures["mutations_decoded"], figures["mutations_refused"]) > 80
