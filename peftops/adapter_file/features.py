"""Fields of adapter_config.json that make an adapter more than LoRA or DoRA."""

import re

# Initializations that change the base's weights.
MOVES_BASE = re.compile("pissa.*|olora|corda|loftq", re.IGNORECASE)
UNREAD = {
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
LACKED = {
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
