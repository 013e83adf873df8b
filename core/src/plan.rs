//! The plan: an image checked against this host and these options, before anything is touched.

use crate::backend::{RestoreOptions, Restorer, Skeleton};
use crate::error::RestoreError;
use crate::host;
use crate::image::Image;
use crate::resource::{
    Check, attributes, cgroups, credentials, descriptors, filesystem, limits, locks, memory, scheduling, signals,
    sysvipc, tasks, timers,
};

/// An image that this host can bring back, as far as can be known beforehand.
pub struct Plan<'a> {
    restorer: &'a dyn Restorer,
    image: &'a Image,
}

impl<'a> Plan<'a> {
    /// Checks everything that can be checked.
    ///
    /// # Errors
    /// [`RestoreError::Refused`] with all that is in the way.
    pub fn new(
        restorer: &'a dyn Restorer,
        image: &'a Image,
        options: &RestoreOptions,
    ) -> Result<Plan<'a>, RestoreError> {
        let mut refusals = Vec::new();
        host::check(&image.host, &mut refusals);
        let mut context = Check { image, options, refusals: &mut refusals, resource: tasks::NAME, pid: None };
        tasks::check(restorer.renames(), &mut context);
        context.resource = cgroups::NAME;
        cgroups::check(image, &mut context);
        context.resource = tasks::NAME;
        descriptors::check(image, &mut context);
        locks::check(image, &mut context);
        sysvipc::check(image, &mut context);
        for process in &image.processes {
            context.pid = Some(process.task.pid);
            context.resource = memory::NAME;
            memory::check(&process.memory, &mut context);
            context.check::<filesystem::ProcessFilesystem>(&process.filesystem);
            context.check::<signals::ProcessSignals>(&process.signals);
            context.check::<timers::ProcessTimers>(&process.timers);
            context.check::<limits::ResourceLimits>(&process.limits);
            context.check::<attributes::Attributes>(&process.attributes);
            for thread in &process.threads {
                context.check::<signals::ThreadSignals>(&thread.signals);
                context.check::<credentials::ThreadCredentials>(&thread.credentials);
                context.check::<scheduling::ThreadScheduling>(&thread.scheduling);
                context.check::<attributes::ThreadAttributes>(&thread.attributes);
            }
        }
        refusals.extend(restorer.check(image));
        if refusals.is_empty() { Ok(Plan { restorer, image }) } else { Err(RestoreError::Refused(refusals)) }
    }

    pub fn skeleton(&self) -> Result<Box<dyn Skeleton>, RestoreError> {
        self.restorer.skeleton(self.image)
    }
}
