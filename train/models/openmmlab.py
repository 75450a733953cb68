"""Export of models to OpenMMLab's libraries: a checkpoint, and the config that builds the same model there.

The backbone is `SaccadeBackbone`, which saccade.integrations.mmdet registers. The config is for mmdet 3 and mmseg 1;
the checkpoint's parameter names are those of mmdet 2 and mmseg 0 too. The functions below `to_config` each return a
part of that config.
"""

from collections.abc import Sequence
from pprint import pformat
from typing import Any

from torch import nn

from .anchor_heads import RATIOS, RetinaHead, RPNHead
from .detectors import RCNN, Detector, RetinaNet
from .roi_heads import GIOU_WEIGHT, STAGES, STDS, BoxHead, CascadeRoIHead, RoIHead
from .segmenter import Segmenter
from .upernet import UPerNet

BODY = "backbone.body."  # prefix of the parameter names of a SaccadeBackbone


def to_openmmlab(model: nn.Module, class_names: Sequence[str]) -> dict[str, Any]:
    """Return an OpenMMLab checkpoint, for torch.save, of a detector, a segmenter or a backbone alone.

    model: a Detector, a Segmenter, or what create_features made. `meta` has the classes in label order and, as `cfg`
    and `config`, the text of `to_config`. Parameters keep their dtype.
    """
    if isinstance(model, (Detector, Segmenter)):
        state = {rename(key): value for key, value in model.state_dict().items()}
        names = tuple(class_names)
        meta: dict[str, Any] = dict(CLASSES=names, dataset_meta=dict(classes=names))
    else:
        state, meta = {BODY + key: value for key, value in model.state_dict().items()}, {}
    text = to_config(model)
    return dict(meta=meta | dict(cfg=text, config=text), state_dict={k: v.detach().cpu() for k, v in state.items()})


def rename(key: str) -> str:
    return BODY + key.removeprefix("backbone.") if key.startswith("backbone.") else key


def to_config(model: nn.Module) -> str:
    """Return the text of an OpenMMLab config for a model; for a backbone alone, only the backbone's section.

    Images are read, resized and normalised as here. Training settings are the published ones, with the model's numbers
    of samples; data, optimizer and schedule are left to the user.
    """
    backbone = dict(type="SaccadeBackbone", **(model.body if hasattr(model, "body") else model).arguments)
    sections: dict[str, Any] = dict(custom_imports=dict(imports=["saccade.integrations.mmdet"]))
    if isinstance(model, Detector):
        sections |= dict(default_scope="mmdet", model=detector(model, backbone))
        steps = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=model.test_size[::-1], keep_ratio=True)]
        kept = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        steps += [dict(type="PackDetInputs", meta_keys=kept)]
    elif isinstance(model, Segmenter):
        sections |= dict(default_scope="mmseg", model=segmenter(model, backbone))
        inference, steps = model.inference, [dict(type="LoadImageFromFile")]
        if inference.scale is not None:
            steps += [dict(type="Resize", scale=tuple(inference.scale), keep_ratio=True)]
        if inference.multiple > 1:
            steps += [dict(type="ResizeToMultiple", size_divisor=inference.multiple)]
        steps += [dict(type="PackSegInputs")]
    else:
        return _assignments(sections | dict(model=dict(backbone=backbone)))
    return _assignments(sections | dict(test_pipeline=steps, test_dataloader=dict(dataset=dict(pipeline=steps))))


def _assignments(sections: dict[str, Any]) -> str:
    return "".join(f"{name} = {pformat(value, width=100, sort_dicts=False)}\n" for name, value in sections.items())


def detector(model: Detector, backbone: dict[str, Any]) -> dict[str, Any]:
    """Return the `model` section of a detector's config."""
    head = model.bbox_head if isinstance(model, RetinaNet) else model.rpn_head
    masks = isinstance(model, RCNN) and model.roi_head.has_masks
    channels = model.neck.lateral_convs[0].conv.out_channels
    neck = dict(
        type="FPN",
        in_channels=[unit.conv.in_channels for unit in model.neck.lateral_convs],
        out_channels=channels,
        num_outs=len(head.anchors.strides),
    )
    if model.neck.extra == "conv":
        neck |= dict(add_extra_convs="on_input", relu_before_extra_convs=model.neck.relu_before_extra)
    preprocessor = preprocessing(model, "DetDataPreprocessor") | dict(pad_size_divisor=model.divisor, pad_mask=masks)
    section = dict(data_preprocessor=preprocessor, backbone=backbone | dict(norm_eval=model.norm_eval), neck=neck)
    if isinstance(model, RetinaNet):
        return dict(type="RetinaNet", **section, **retina(model.bbox_head, channels))
    return dict(**section, **rcnn(model, channels))


def preprocessing(model: nn.Module, kind: str) -> dict[str, Any]:
    """Return a data_preprocessor section; OpenMMLab reads images as BGR, 0 … 255."""
    scale = 1 if isinstance(model, Detector) else 255
    mean, std = ([round(scale * value, 4) for value in x.flatten().tolist()] for x in (model.mean, model.std))
    return dict(type=kind, mean=mean, std=std, bgr_to_rgb=True)


def anchors(head: RPNHead | RetinaHead) -> dict[str, Any]:
    return dict(
        type="AnchorGenerator", scales=head.anchors.scales, ratios=list(RATIOS), strides=list(head.anchors.strides)
    )


def coder(stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> dict[str, Any]:
    return dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=list(stds))


def assigner(positive: float, negative: float, low: float, low_quality: bool = True) -> dict[str, Any]:
    thresholds = dict(pos_iou_thr=positive, neg_iou_thr=negative, min_pos_iou=low)
    return dict(type="MaxIoUAssigner", **thresholds, match_low_quality=low_quality, ignore_iof_thr=-1)


def sampler(count: int, share: float, add_truth: bool) -> dict[str, Any]:
    return dict(type="RandomSampler", num=count, pos_fraction=share, neg_pos_ub=-1, add_gt_as_proposals=add_truth)


L1 = dict(type="L1Loss", loss_weight=1.0)
CROSS_ENTROPY = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)
NMS = dict(type="nms", iou_threshold=0.5)


def retina(head: RetinaHead, channels: int) -> dict[str, Any]:
    """Return RetinaNet's head with its settings in training and tests."""
    focal = dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
    bbox_head = dict(type="RetinaHead", num_classes=head.num_classes, in_channels=channels, feat_channels=channels)
    bbox_head |= dict(stacked_convs=4, anchor_generator=anchors(head), bbox_coder=coder())
    bbox_head |= dict(loss_cls=focal, loss_bbox=L1)
    train = dict(assigner=assigner(0.5, 0.4, 0), sampler=dict(type="PseudoSampler"))
    train |= dict(allowed_border=-1, pos_weight=-1, debug=False)
    # -1: keeps boxes without width or height, as mmdet 2 does.
    test = dict(nms_pre=1000, min_bbox_size=-1, score_thr=head.score_thresh, nms=NMS, max_per_img=head.detections)
    return dict(bbox_head=bbox_head, train_cfg=train, test_cfg=test)


def rcnn(model: RCNN, channels: int) -> dict[str, Any]:
    """Return an R-CNN's heads with their settings in training and tests."""
    rpn, roi = model.rpn_head, model.roi_head
    cascade = isinstance(roi, CascadeRoIHead)
    smooth = dict(type="SmoothL1Loss", beta=1 / 9, loss_weight=1.0)
    rpn_head = dict(
        type="RPNHead",
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=anchors(rpn),
        bbox_coder=coder(),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox=smooth if rpn.of_cascade else L1,
    )
    stage = dict(mask_size=28, pos_weight=-1, debug=False, sampler=sampler(roi.rois, 0.25, add_truth=True))
    if cascade:
        stages = [stage | dict(assigner=assigner(t, t, t, low_quality=False)) for t, _, _ in STAGES]
    else:
        stages = [stage | dict(assigner=assigner(0.5, 0.5, 0.5))]
    proposal = dict(nms_pre=rpn.proposals, max_per_img=rpn.proposals, nms=NMS | dict(iou_threshold=0.7))
    proposal |= dict(min_bbox_size=0)
    training = proposal | dict(nms_pre=2 * rpn.proposals, max_per_img=(1 + rpn.of_cascade) * rpn.proposals)
    train_rpn = dict(assigner=assigner(0.7, 0.3, 0.3), sampler=sampler(rpn.rpn_samples, 0.5, add_truth=False))
    train_rpn |= dict(allowed_border=0 if rpn.of_cascade else -1, pos_weight=-1, debug=False)
    test = dict(score_thr=roi.score_thresh, nms=NMS, max_per_img=roi.detections, mask_thr_binary=0.5)
    return dict(
        type="CascadeRCNN" if cascade else "MaskRCNN" if roi.has_masks else "FasterRCNN",
        rpn_head=rpn_head,
        roi_head=roi_head(roi, channels),
        train_cfg=dict(rpn=train_rpn, rpn_proposal=training, rcnn=stages if cascade else stages[0]),
        test_cfg=dict(rpn=proposal, rcnn=test),
    )


def roi_head(head: RoIHead, channels: int) -> dict[str, Any]:
    def extractor(side: int) -> dict[str, Any]:
        layer = dict(type="RoIAlign", output_size=side, sampling_ratio=0)
        strides = list(head.strides)
        return dict(type="SingleRoIExtractor", roi_layer=layer, out_channels=channels, featmap_strides=strides)

    mask = dict(type="FCNMaskHead", num_convs=4, in_channels=channels, conv_out_channels=channels)
    mask |= dict(num_classes=head.num_classes, loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0))
    masks = dict(mask_roi_extractor=extractor(14)) if head.has_masks else {}
    if not isinstance(head, CascadeRoIHead):
        masks |= dict(mask_head=mask) if head.has_masks else {}
        boxes = box_head(head.bbox_head, channels, head.num_classes, STDS)
        return dict(type="StandardRoIHead", bbox_roi_extractor=extractor(7), bbox_head=boxes, **masks)
    masks |= dict(mask_head=[mask for _ in STAGES]) if head.has_masks else {}
    boxes = [box_head(part, channels, head.num_classes, stds) for part, (_, _, stds) in zip(head.bbox_head, STAGES)]
    weights = [weight for _, weight, _ in STAGES]
    kind = dict(type="CascadeRoIHead", num_stages=len(STAGES), stage_loss_weights=weights)
    return dict(**kind, bbox_roi_extractor=extractor(7), bbox_head=boxes, **masks)


def box_head(head: BoxHead, channels: int, num_classes: int, stds: Sequence[float]) -> dict[str, Any]:
    hidden = head.fc_cls.in_features
    section = dict(type="ConvFCBBoxHead", num_shared_convs=head.convs, num_shared_fcs=len(head.shared_fcs))
    section |= dict(in_channels=channels, conv_out_channels=channels, fc_out_channels=hidden, roi_feat_size=7)
    section |= dict(num_classes=num_classes, bbox_coder=coder(stds), loss_cls=CROSS_ENTROPY, loss_bbox=L1)
    section |= dict(reg_class_agnostic=head.fc_reg.out_features == 4 and num_classes > 1)
    if head.convs:  # cascades have a GIoU loss on their boxes
        loss = dict(type="GIoULoss", loss_weight=GIOU_WEIGHT)
        section |= dict(norm_cfg=dict(type="BN", requires_grad=True), reg_decoded_bbox=True, loss_bbox=loss)
    return section


def segmenter(model: Segmenter, backbone: dict[str, Any]) -> dict[str, Any]:
    """Return the `model` section of a segmenter's config."""
    head = model.decode_head
    widths = model.backbone.feature_info.channels()[-4:]
    classes, channels = head.conv_seg.out_channels, head.conv_seg.in_channels
    common = dict(num_classes=classes, norm_cfg=dict(type="BN", requires_grad=True), align_corners=False)
    decode = dict(in_index=list(range(len(widths))), channels=channels, dropout_ratio=head.dropout.p, **common)
    decode |= dict(loss_decode=CROSS_ENTROPY)
    section = dict(type="EncoderDecoder", data_preprocessor=preprocessing(model, "SegDataPreProcessor"))
    section["data_preprocessor"] |= dict(pad_val=0, seg_pad_val=255)
    maps = tuple(model.backbone.feature_info.out_indices[-4:])
    section |= dict(pretrained=None, backbone=backbone | dict(out_indices=maps))
    if isinstance(head, UPerNet):
        bins = tuple(pool[0].output_size for pool in head.psp_modules)
        decode |= dict(type="UPerHead", in_channels=widths, pool_scales=bins)
    else:
        pyramid = model.neck.lateral_convs[0].conv.out_channels
        strides = model.backbone.feature_info.reduction()[-4:]
        section |= dict(neck=dict(type="FPN", in_channels=widths, out_channels=pyramid, num_outs=len(widths)))
        decode |= dict(type="FPNHead", in_channels=[pyramid] * len(widths), feature_strides=strides)
    section |= dict(decode_head=decode)
    if model.auxiliary_head is not None:
        part = model.auxiliary_head
        width = part.conv_seg.in_channels
        loss = CROSS_ENTROPY | dict(loss_weight=0.4)
        place = part.level % len(widths)
        auxiliary = dict(type="FCNHead", in_channels=widths[place], in_index=place, channels=width, num_convs=1)
        auxiliary |= dict(concat_input=False, dropout_ratio=part.dropout.p, loss_decode=loss, **common)
        section |= dict(auxiliary_head=auxiliary)
    test = dict(mode="whole")
    if (crop := model.inference.crop) is not None:
        test = dict(mode="slide", crop_size=tuple(crop), stride=tuple(model.inference.stride or crop))
    return dict(**section, train_cfg=dict(), test_cfg=test)
