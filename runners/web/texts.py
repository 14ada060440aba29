"""What the page says, in each of its languages."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

# English and Chinese of each text.
TEXTS = {
    "title": (
        "# Edit and draw pictures\nHiDream-E1 changes pictures as you say; Stable Diffusion 2.1 draws new ones.",
        "# 图片编辑与绘制\nHiDream-E1 按您的描述修改图片，Stable Diffusion 2.1 绘制新图片。",
    ),
    "language": ("Language", "语言"),
    "edit_tab": ("Edit pictures", "编辑图片"),
    "draw_tab": ("Draw", "绘图"),
    "model": ("Model", "模型"),
    "pictures": ("Pictures to edit: one or several", "要编辑的图片（一张或多张）"),
    "instruction": ("Instruction", "编辑指令"),
    "instruction_hint": ("what to change, as: make the sky red", "要修改什么，例如：make the sky red"),
    "description": ("Description of the result", "结果描述"),
    "description_hint": (
        "what the result shows; refining goes towards it",
        "结果图中的内容，精修阶段以此为目标",
    ),
    "settings": ("Settings", "设置"),
    "negative_prompt": ("Negative prompt", "反向提示词"),
    "negative_prompt_hint": ("what the result should not be", "结果中不应出现的内容"),
    "steps": ("Steps", "步数"),
    "guidance_scale": ("Guidance by the text", "文本引导强度"),
    "image_guidance_scale": ("Guidance by the picture", "图片引导强度"),
    "refine_strength": ("Refining: share of the steps", "精修强度（占步数的比例）"),
    "clip_cfg_norm": ("Limit what guidance adds", "限制引导的幅度"),
    "refine_words": ("Let a language model word instruction and description", "由语言模型改写编辑指令与结果描述"),
    "refine_words_hint": (
        "by the endpoint of OPENAI_BASE_URL; wants OPENAI_API_KEY, and openai installed",
        "使用 OPENAI_BASE_URL 指定的服务；需要 OPENAI_API_KEY 并安装 openai",
    ),
    "wording": ("wording the instruction ...", "正在改写编辑指令……"),
    "seed": ("Seed", "随机种子"),
    "num_images": ("Number of pictures", "图片数量"),
    "prompt": ("Prompt", "提示词"),
    "prompt_hint": ("what to draw", "要绘制的内容"),
    "edit": ("Edit", "开始编辑"),
    "draw": ("Draw", "开始绘制"),
    "cancel": ("Cancel", "取消"),
    "result": ("Before and after", "编辑前后对比"),
    "results": ("Results: choose one to compare", "结果：点选一张进行对比"),
    "drawn": ("Pictures", "图片"),
    "files": ("Download: each result, and a .json of how it was made", "下载：每个结果及其生成参数（.json）"),
    "loading": ("loading the model ...", "正在加载模型……"),
    "step": ("step {step} of {steps}", "第 {step}/{steps} 步"),
    "picture_step": (
        "picture {number} of {count}, step {step} of {steps}",
        "第 {number}/{count} 张，第 {step}/{steps} 步",
    ),
    "cancelled": ("cancelled", "已取消"),
    "no_picture": ("upload a picture first", "请先上传图片"),
    "no_instruction": ("the instruction is empty: say what to change", "编辑指令为空：请说明要修改什么"),
    "no_prompt": ("the prompt is empty: say what to draw", "提示词为空：请说明要绘制什么"),
    "no_description": (
        "without a description refining goes towards the instruction, as if that described a picture",
        "没有结果描述时，精修阶段会把编辑指令当作图片描述",
    ),
    "status": (
        "**{device}** · {dtype} · memory {used} of {total} in use, peak {peak} · {model} · {state}",
        "**{device}** · {dtype} · 内存已用 {used} / {total}，峰值 {peak} · {model} · {state}",
    ),
    "nothing_loaded": ("no model loaded yet", "尚未加载模型"),
    "busy": ("computing", "计算中"),
    "idle": ("ready", "就绪"),
}


def text(key: str, language: str, **values: object) -> str:
    """That of `TEXTS` in `language`, with `values` in it."""
    return TEXTS[key][list(LANGUAGES).index(language)].format(**values)
