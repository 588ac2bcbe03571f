"""Makes transformers' Auto classes know the hybrids after `import hybridize`, which imports no transformers.

`import hybridize` must stay light (`hybridize --help` answers at once), yet after it
`AutoModelForCausalLM.from_pretrained(a_hybrid)` must work, whether transformers was imported before or comes
after. So registration waits for the modules of the Auto classes:

* if they are imported already, it happens at once;
* if not, a finder at the head of `sys.meta_path` wraps the loaders of transformers' modules just to notice
  when an import is over. Transformers' modules import one another in circles, so "over" means the outermost
  of them: only then is it safe to import more of transformers. When both modules have come, the finder
  removes itself.

Two steps, because they weigh differently. The config classes of all families are registered with
`AutoConfig`; they cost next to nothing. A family's model class costs the import of its modelling code; it is
registered with `AutoModelForCausalLM` when the first config of that family is made, which every
`from_pretrained` does before it looks for a model class. All of it is idempotent.
"""

import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"

_wanted: set[str] = set()
_registered: set[str] = set()


def install() -> None:
    """Arrange for the hybrids to be registered as soon as transformers' Auto classes are imported."""
    _register_what_is_there()
    finder_is_there = any(isinstance(finder, _TransformersWatcher) for finder in sys.meta_path)
    if not finder_is_there and not {_CONFIGS, _MODELS} <= sys.modules.keys():
        sys.meta_path.insert(0, _TransformersWatcher())


def register_model(model_type: str) -> None:
    """Register a family's hybrid model class with `AutoModelForCausalLM`, now or once that is imported.

    Args:
        model_type: the teacher's model type, e.g. `llama`.
    """
    if model_type not in _registered:
        _wanted.add(model_type)
        _register_what_is_there()


def _register_what_is_there() -> None:
    if _CONFIGS in sys.modules:
        _once(_CONFIGS, _register_configs, sys.modules[_CONFIGS])
    if _MODELS in sys.modules:
        for model_type in sorted(_wanted):
            _once(model_type, _register_model, sys.modules[_MODELS], model_type)


def _once(what: str, action: Callable[..., None], *arguments: Any) -> None:
    """Run an action unless it has run; marked before it runs, since what it imports comes by here again."""
    if what in _registered:
        return
    _registered.add(what)
    try:
        action(*arguments)
    except BaseException:
        _registered.discard(what)
        raise


def _register_configs(auto: Any) -> None:
    from hybridize.models.configs import hybrid_config_class
    from hybridize.models.families import FAMILIES, NotInTransformersError

    for family in FAMILIES.values():
        try:
            config_class = hybrid_config_class(family.model_type)
        except NotInTransformersError:
            continue  # a family of a later transformers than the one installed
        auto.AutoConfig.register(family.hybrid_type, config_class, exist_ok=True)


def _register_model(auto: Any, model_type: str) -> None:
    from hybridize.models.configs import hybrid_config_class
    from hybridize.models.hybrid import hybrid_model_class

    auto.AutoModelForCausalLM.register(hybrid_config_class(model_type), hybrid_model_class(model_type), exist_ok=True)


class _TransformersWatcher(MetaPathFinder):
    """Finds nothing itself; notices when an outermost import within transformers is over."""

    def __init__(self) -> None:
        self.thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("transformers.") or getattr(self.thread, "searching", False):
            return None
        self.thread.searching = True  # the search below comes by here again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.thread.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _WatchedLoader(spec.loader, self)
        return spec

    def enter(self) -> None:
        """An import begins."""
        self.thread.depth = getattr(self.thread, "depth", 0) + 1

    def leave(self) -> None:
        """An import is over."""
        self.thread.depth -= 1
        if self.thread.depth == 0:
            if {_CONFIGS, _MODELS} <= sys.modules.keys() and self in sys.meta_path:
                sys.meta_path.remove(self)
            _register_what_is_there()


class _WatchedLoader(Loader):
    """Loads a module just as its own loader does, and tells the watcher about begin and end."""

    def __init__(self, loader: Loader, watcher: _TransformersWatcher) -> None:
        self.loader = loader
        self.watcher = watcher

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.watcher.enter()
        try:
            self.loader.exec_module(module)
        finally:
            self.watcher.leave()
