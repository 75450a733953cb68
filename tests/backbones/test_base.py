import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm


@pytest.mark.parametrize(("name", "maps"), [("davit_t", 4), ("halo_h0", 5), ("agent_pvt_t", 4), ("agent_deit_t", 12)])
def test_features_that_are_not_there_are_refused_in_one_sentence(name, maps):
    with pytest.raises(AssertionError, match=rf"feature index {maps} is out of range \(0 to {maps - 1}\)"):
        timm.create_model(name, features_only=True, out_indices=(0, maps))
    model = timm.create_model(name, device="meta")
    with pytest.raises(ValueError, match=r"output_fmt must be 'NCHW'.* got 'NHWC'"):
        model.forward_intermediates(None, output_fmt="NHWC")
