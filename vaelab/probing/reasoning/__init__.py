"""Visual reasoning: whether a language model answers better about pictures with a denoiser's features.

Kim et al. ("Revelio"), section 4.6, Table 4 and appendix C, after LLaVA (Liu et al. 2023) and the interleaving of
features of Tong et al. (2024).
"""
