"""JSON files of ours that are damaged: one line that names the file, whatever the damage."""

import json

import pytest

from pretrain_lib.data.prepare.holdout import HeldOut
from pretrain_lib.files.reading import interpreting, read_object


@pytest.mark.parametrize(
    "content", ['{"\\n": null}', '{"documents": [1]}', "{", "[]", '"a\\nb"', '{"a": 1,\n"b"}', ""]
)
def test_damage_of_every_kind_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"record.json is damaged.*; restore the file$") as refused:
        record = read_object(path, remedy="restore the file")
        with interpreting(path, remedy="restore the file"):
            HeldOut(**record).documents + json.loads(content)["documents"][0]
    assert "\n" not in str(refused.value)
