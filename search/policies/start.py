import numpy as np
def z_scores(scores, groups):
    n=np.bincount(groups); m=np.bincount(groups,weights=scores)/n
    d=scores-m[groups]; s=np.sqrt(np.bincount(groups,weights=d*d)/np.maximum(n-1,1))
    return d/(s[groups]+1e-8)
def start_logits(mapping, scores, groups, budget, seed):
    return z_scores(scores, groups) if mapping!="flat" else np.zeros(len(scores))
